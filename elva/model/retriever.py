"""The retriever: a model that ends what it writes with [RET] and is read out there.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: the model is asked to analyse and summarise its input
and to end with a registered special token; the hidden state at that token is the embedding.

Nothing here knows how large a model is, or of which family.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from elva.data import Item
from elva.model import adapters
from elva.model.family import decoder_of, family_of, read_inputs, read_model, unreadable
from elva.model.inputs import Inputs, PromptBatch
from elva.model.packing import completions_a_reading, pack
from elva.recipe import LoraSettings

NOTE = "elva.json"
"""Beside the weights: how a checkpoint wants to be asked, and what its adapter stands on (written
by `Retriever.save`)."""

FEATURES_KEPT_MB = 1024
"""Features of pictures kept while the vision tower is frozen."""

P, T = ParamSpec("P"), TypeVar("T")


class Retriever(nn.Module):
    """A model, what it reads (`inputs`) and the features of pictures it has seen."""

    def __init__(self, model: PreTrainedModel | PeftModel, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.family = family_of(self.plain.config)
        self.train_vision = False
        self.name = ""
        self.base: adapters.Base | None = None
        self._features: dict[str, Tensor] = {}

    def forward(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(...)`: whatever touches weights runs in such a call, which is what a wrapper of
        several processes (DDP, FSDP2, DeepSpeed) sees of the model."""
        return work(*args, **kwargs)

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        summary_prompt: str | None = None,
        inputs: Inputs | None = None,
        revision: str | None = None,
        attention: str | None = None,
    ) -> Retriever:
        """Read a checkpoint directory or a hub name; an adapter is opened on its base, unmerged.

        Args:
            summary_prompt: how the model is asked to summarise; None takes the checkpoint's own.
            inputs: of an earlier model of the same run, to tokenise nothing twice.
            revision: of a hub name: a branch, a tag or a commit.
            attention: transformers' `attn_implementation`.

        Raises:
            UserError: a model that ELVA cannot read, or an adapter whose base has gone.
        """
        note = _note(Path(path))
        if inputs is None:
            if summary_prompt is None:
                summary_prompt = note.get("summary_prompt", "")
            inputs = read_inputs(path, summary_prompt, revision)
        if adapters.is_adapter(Path(path)):
            base = adapters.Base.read(Path(path), note["base"])
        else:
            base = adapters.Base(str(path), revision, inputs.ret_is_new and not note)
        plain = read_model(base.path, base.revision, attention)
        if len(inputs.tokenizer) > plain.lm_head.out_features:
            plain.resize_token_embeddings(len(inputs.tokenizer), mean_resizing=False)
        if base.ret_is_new:
            _begin_as_chat_end(plain, inputs)
        model = adapters.load(plain, Path(path)) if adapters.is_adapter(Path(path)) else plain
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's, one process a GPU
        device = torch.device(gpu if torch.cuda.is_available() else "cpu")
        retriever = cls(model.eval().to(device), inputs)
        retriever.name, retriever.base = str(path), base
        if retriever.family.probed:
            from elva.model.probe import fault  # which reads by the retriever itself

            if reason := fault(retriever):
                raise unreadable(path, plain.config, reason)
        return retriever

    def save(self, path: Path, *, merge: bool = False) -> None:
        """Write weights (safetensors), tokenizer and processor: a model of which a part was
        trained, and so is in fp32, in fp32 whole; of one with an adapter the adapter alone, and
        where its base lies.

        Args:
            merge: write an ordinary checkpoint in fp32 instead, as other programs read it. So is
                one whose vision tower learnt, or whose base was read from no file.
        """
        note: dict[str, Any] = {"summary_prompt": self.inputs.summary_prompt}
        if isinstance(self.model, PeftModel) and not (
            merge or self.train_vision or self.base is None
        ):
            adapters.save(self.model, path)
            self.plain.config.save_pretrained(path)
            if self.plain.generation_config is not None:
                self.plain.generation_config.save_pretrained(path)
            note["base"] = self.base.seen_from(path)
        else:
            whole = self.merged()
            mixed = merge or len({p.dtype for p in whole.parameters()}) > 1
            (whole.float() if mixed else whole).save_pretrained(path)
        self.inputs.save(path)
        (path / NOTE).write_text(json.dumps(note))

    def merged(self) -> PreTrainedModel:
        """The plain model: itself, or a copy in fp32 with the adapter merged into the weights."""
        if not isinstance(self.model, PeftModel):
            return self.model
        whole = copy.deepcopy(self.model).to(self.embedding_dtype)
        plain: PreTrainedModel = whole.merge_and_unload(adapter_names=[adapters.LEARNER])
        return plain

    def add_lora(self, settings: LoraSettings, *, keep: bool = True) -> None:
        """Put an adapter on the language model and the rows of [RET]: a fresh one, or one that
        goes on from the model's own. Rank 0 merges what there is, in fp32: all weights learn.

        Args:
            keep: whether `reference` will be asked for the adapter that there is.

        Raises:
            UserError: the rank is less than that of the adapter it goes on from.
        """
        if settings.rank == 0:
            self.model = self.merged()
            return
        self.model = adapters.begin(self.model, settings, self.inputs.ret_id, keep=keep)

    @contextmanager
    def reference(self) -> Iterator[Retriever]:
        """This model as it was before `add_lora`: what a stage under an adapter began with."""
        assert isinstance(self.model, PeftModel)
        with adapters.reference(self.model):
            yield self

    def train_in_fp32(self) -> None:
        """Keep what is trained in fp32, whatever the checkpoint's dtype: bf16 swallows updates
        smaller than 1/256 of a weight."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.embedding_dtype)

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model, with an adapter's layers inside it where there is one."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast(PreTrainedModel, model)

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return decoder_of(self.plain)

    @property
    def device(self) -> torch.device:
        return self.plain.device

    @property
    def embedding_size(self) -> int:
        return int(self.plain.config.get_text_config().hidden_size)

    @property
    def embedding_dtype(self) -> torch.dtype:
        """fp32, or fp64 of a model that computes in it."""
        return torch.promote_types(self.plain.dtype, torch.float32)

    # -- pictures ----------------------------------------------------------------------------------

    def image_features(self, images: Iterable[str]) -> dict[str, Tensor]:
        """Vision tower once per distinct picture, each alone: {picture: [tokens, W]}.

        Gradients flow only while the tower trains; a frozen tower's features come from `remember`
        where they are kept.
        """
        wanted = list(dict.fromkeys(images))
        features = {i: self._features[i] for i in wanted if i in self._features}
        for image in wanted:
            if image not in features:
                with torch.set_grad_enabled(self.train_vision and torch.is_grad_enabled()):
                    features[image] = self.picture_features(image)
        return features

    def picture_features(self, image: str) -> Tensor:
        """[tokens, W] of a picture that was prompted, by the vision tower of now."""
        pixels = {k: v.to(self.device) for k, v in self.inputs.pixels(image).items()}
        return self.family.features(self.plain, pixels)

    def remember(self, items: Iterable[Item], *, at_most: int | None = None) -> bool:
        """Whether a frozen tower's features of some items' pictures, all of them, are kept now.

        All or none: a cache that fills as it goes would make the bits of a feature depend on which
        pictures happened to share its batch, and a resumed run differ from the one that was not
        killed.

        Args:
            at_most: pictures that there can be, where it is known: what cannot fit is not read.
        """
        token = self.embedding_size * 4  # bytes
        if self.train_vision or (at_most or 0) * token > FEATURES_KEPT_MB << 20:
            return False
        seen: dict[str, None] = {}
        total = 0
        for item in items if at_most != 0 else ():
            if item.image is None:
                continue
            prompt = self.inputs.prompt(item)
            if prompt.image is not None and prompt.image not in seen:
                seen[prompt.image] = None
                total += int((prompt.input_ids == self.inputs.image_id).sum()) * token
            if total > FEATURES_KEPT_MB << 20:
                return False
        wanted = [image for image in seen if image not in self._features]
        with torch.no_grad():
            self._features.update((k, f.clone()) for k, f in self.image_features(wanted).items())
        return True

    def forget(self) -> None:
        """Drop the features that are kept."""
        self._features = {}

    def freeze_vision(self, frozen: bool) -> None:
        """Choose whether the vision tower learns; either way features of earlier weights are
        dropped."""
        self.train_vision = not frozen
        self._features = {}
        words = {id(p) for p in self.decoder.parameters()}
        for parameter in self.plain.model.parameters():
            if id(parameter) not in words:
                parameter.requires_grad_(not frozen)

    def read(
        self,
        input_ids: Tensor,
        images: Sequence[str | None],
        attention_mask: Tensor,
        position_ids: Tensor,
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states of the language model on words and pictures, normalised: [R, L, H].

        Args:
            input_ids: [R, L]; a picture's placeholders are where its features go.
            images: the rows' pictures.
            attention_mask: [R, S], or [R, 1, L, S] bool, over what is cached and what is read.
            position_ids: [3, R, L].
            cache: holds what was read before, and what is read now from then on.
        """
        embeds = self.plain.get_input_embeddings()(input_ids)
        shown = [i for i in images if i is not None]
        given = {"inputs_embeds": embeds}
        if shown:
            features = self.image_features(shown)
            given = self.family.with_pictures(
                embeds, torch.cat([features[i] for i in shown]), input_ids == self.inputs.image_id
            )
        decoder = self.decoder
        states: Tensor = decoder(
            **given,
            attention_mask=attention_mask,
            # Never left to the model: it would reuse the rope offset of an earlier picture.
            position_ids=self.family.positions(position_ids),
            use_cache=cache is not None,
            **{_cache_name(type(decoder)): cache},
        ).last_hidden_state
        return states

    def hidden_states(self, prompts: PromptBatch, completions: Tensor, mask: Tensor) -> Tensor:
        """Teacher-forced forward over P prompts, each with G completions.

        Args:
            completions: [P * G, T] token ids padded on the right; row i * G + g is of prompt i.
            mask: [P * G, T] bool, True where real.

        Returns:
            [P * G, T + 1, H]: the normalised hidden states that predict each completion token, and
            after each; column t + 1 is the state *at* completion token t. Columns of what is not
            real hold the states of others.
        """
        lengths = mask.sum(1).tolist()
        share = completions_a_reading(
            self.decoder.config, prompts.input_ids.shape[1], lengths, len(mask) // len(prompts)
        )
        packed = pack(prompts, completions, mask, share, self.inputs.tokenizer.pad_token_id)
        states = self.read(
            torch.cat([packed.prompts.input_ids, packed.completion_ids], dim=1),
            packed.prompts.images,
            packed.attention_mask,
            packed.position_ids,
        )
        return packed.unpack(states)


def _note(path: Path) -> dict[str, Any]:
    """What `save` wrote beside the weights; nothing of somebody else's checkpoint."""
    file = path / NOTE
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


@lru_cache
def _cache_name(decoder: type[nn.Module]) -> str:
    """What its forward calls a cache; transformers has renamed it."""
    names = inspect.signature(decoder.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Weights that are sharded (FSDP2) brought together once, for what reads them many times and on
    each process at its own pace."""
    from torch.distributed.fsdp import FSDPModule

    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _begin_as_chat_end(model: PreTrainedModel, inputs: Inputs) -> None:
    """Give a new [RET] the rows of the token that it takes the place of: a model that can end an
    answer can then write it from the first step. Ours; the paper does not say."""
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.lm_head):
            table = cast(Tensor, part.weight)
            table[inputs.ret_id] = table[inputs.end_ids[0]]
