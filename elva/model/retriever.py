"""The retriever: a model that ends what it writes with [RET] and is read out there.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: the model is asked to analyse and summarise its input
and to end with a registered special token; the hidden state at that token is the embedding. A
retriever of somebody else keeps its own prompt, pooling and normalisation (`reading`).

Nothing here knows how large a model is, or of which family.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.utils import CONFIG_NAME

from elva.model import adapters
from elva.model.family import HEAD, decoder_of, family_of, read_inputs, read_model, unreadable
from elva.model.inputs import Inputs
from elva.model.note import NOTE, read_note, reading_of, stands_on, trained_on
from elva.model.packing import completions_a_reading, pack
from elva.model.prompt import Prompt, PromptBatch
from elva.model.reading import Reading, wide
from elva.model.vision import FeatureFile, Features, each_alone, fingerprint
from elva.recipe import LoraSettings

P = ParamSpec("P")
T = TypeVar("T")


class Retriever(nn.Module):
    """A model, what it reads (`inputs`) and the features of pictures it has seen."""

    def __init__(self, model: PreTrainedModel | PeftModel, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.log_temperature: nn.Parameter | None = None  # of InfoNCE, while it is learnt
        self.inputs = inputs
        self.family = family_of(self.plain.config)
        self.train_vision = False
        self.name = ""
        self.trained_on: list[str] | None = None  # of one that began from nothing, its data
        self.base: adapters.Base | None = None
        self.writes = True  # whether its checkpoint has a head
        self.classes = list(self.plain.config.architectures or ())  # by which its tools know it
        self.features: Features | None = None  # kept of a frozen tower

    def forward(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(...)`: whatever touches weights runs in such a call, which is what a wrapper of
        several processes (DDP, FSDP2, DeepSpeed) sees of the model."""
        return work(*args, **kwargs)

    @property
    def _no_split_modules(self) -> list[str]:
        """The layers that FSDP shards one by one, where its configuration names none."""
        return [*(self.plain._no_split_modules or [])]

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
        reading: Reading | None = None,
    ) -> Retriever:
        """Read a checkpoint directory or a hub name; an adapter is opened on its base, unmerged.

        Args:
            summary_prompt: how the model is asked to summarise; None takes the checkpoint's own.
            reading: how the model is read out; None takes what the checkpoint's files say.
            inputs: of an earlier model of the same run, to tokenise nothing twice.
            revision: of a hub name: a branch, a tag or a commit.
            attention: transformers' `attn_implementation`.

        Raises:
            UserError: a model that ELVA cannot read, a retriever that it cannot keep, or an adapter
                whose base has gone.
        """
        note = read_note(path)
        folder, base = stands_on(path, revision)
        if inputs is None:
            if summary_prompt is None:
                summary_prompt = note.get("summary_prompt", "")
            inputs = read_inputs(
                path, summary_prompt, revision, base=None if base is None else base.place,
                reading=reading or reading_of(path, revision),
            )  # fmt: skip
        if base is None:
            base = adapters.Base(str(path), revision, inputs.ret_is_new and not note)
        elif "base" not in note:
            base = replace(base, ret_is_new=inputs.ret_is_new)
        plain, writes = read_model(base.path, base.revision, attention)
        base = replace(base, revision=getattr(plain.config, "_commit_hash", None) or base.revision)
        if len(inputs.tokenizer) > plain.lm_head.out_features:
            plain.resize_token_embeddings(len(inputs.tokenizer), mean_resizing=False)
        if base.ret_is_new:
            _begin_as_chat_end(plain, inputs)
        model = plain if folder is None else adapters.load(plain, folder)
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's, one process a GPU
        device = torch.device(gpu if torch.cuda.is_available() else "cpu")
        retriever = cls(model.eval().to(device), inputs)
        retriever.name, retriever.base, retriever.writes = str(path), base, writes
        retriever.trained_on = trained_on(path)
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
        if not self.reading.at_ret:
            note["reading"] = dataclasses.asdict(self.reading)
        if self.trained_on is not None:
            note["trained_on"] = self.trained_on
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
            self._save_whole(whole.float() if mixed else whole, path)
        self.inputs.save(path)
        (path / NOTE).write_text(json.dumps(note))

    def _save_whole(self, whole: PreTrainedModel, path: Path) -> None:
        """A retriever of somebody else as its own class had it, without a head that it lacked."""
        if self.reading.at_ret:
            whole.save_pretrained(path)
            return
        inner = type(whole.model).__name__ in self.classes
        state = None
        if not (inner or self.writes):
            state = {name: value for name, value in whole.state_dict().items() if name != HEAD}
        (whole.model if inner else whole).save_pretrained(path, state_dict=state)
        config = json.loads((path / CONFIG_NAME).read_text("utf-8"))
        config["architectures"] = self.classes or config["architectures"]
        (path / CONFIG_NAME).write_text(json.dumps(config, indent=2))

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
        rows = [self.inputs.ret_id] if self.reading.at_ret else []
        self.model = adapters.begin(self.model, settings, rows, keep=keep)

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
    def reading(self) -> Reading:
        """How it is asked and read out."""
        return self.inputs.reading

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
        """{picture: [tokens, W]}, the vision tower once per distinct picture, each as if alone.

        While the tower trains, with gradients; without autocast where it does not; kept once it is
        frozen.
        """
        if self.features is None:
            wanted = list(dict.fromkeys(images))
            return dict(zip(wanted, self._towers(wanted), strict=True))
        return self.features.get(images, self._towers, self.device)

    def _towers(self, images: Sequence[str]) -> list[Tensor]:
        frozen = not self.train_vision
        plainly = torch.autocast(self.device.type, enabled=False) if frozen else nullcontext()
        with torch.set_grad_enabled(self.train_vision and torch.is_grad_enabled()), plainly:
            return each_alone(self._tower, map(self.inputs.pixels, images))

    def _tower(self, pixels: Mapping[str, Tensor]) -> Tensor:
        there = {name: value.to(self.device) for name, value in pixels.items()}
        return self.family.features(self.plain, there)

    def hold(self, prompts: Sequence[Prompt], then: Sequence[Prompt] = ()) -> None:
        """Make a step's features at once, and keep them until the next step's.

        Args:
            then: the next step's prompts, whose pictures are cut meanwhile.
        """
        self.cut_ahead([*prompts, *then])
        images = [p.image for p in prompts if p.image is not None]
        if self.features is not None:
            self.features.hold(images)
            self.image_features(images)

    def cut_ahead(self, prompts: Iterable[Prompt]) -> None:
        """Let threads cut the pictures of prompts that are read soon, in this order; of a frozen
        tower those whose features are not kept."""
        images = dict.fromkeys(p.image for p in prompts if p.image is not None)
        kept = self.features
        self.inputs.pictures.ahead(i for i in images if kept is None or not kept.has(i))

    def freeze_vision(self, frozen: bool, features: Path | None = None) -> None:
        """Choose whether the vision tower learns; either way features of earlier weights are
        dropped.

        Args:
            features: a directory in which a frozen tower's are kept from run to run.

        Raises:
            UserError: it holds what cannot be read.
        """
        self.train_vision = not frozen
        words = {id(p) for p in self.decoder.parameters()}
        named = self.plain.model.named_parameters()
        tower = {name: p for name, p in named if id(p) not in words}
        file = None
        if frozen and features is not None:
            preprocessing = self.inputs.image_processor.to_json_string()
            file = FeatureFile(features, fingerprint(tower, preprocessing))
        self.features = Features(file, self.inputs.content) if frozen else None
        for parameter in tower.values():
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
            **{_cache_name(type(decoder).forward): cache},
        ).last_hidden_state
        return states

    def hidden_states(self, prompts: PromptBatch, completions: Tensor, mask: Tensor) -> Tensor:
        """The hidden states of `read_out` alone."""
        return self.read_out(prompts, completions, mask)[0]

    def read_out(
        self, prompts: PromptBatch, completions: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Teacher-forced forward over P prompts, each with G completions.

        Args:
            completions: [P * G, T] token ids padded on the right; row i * G + g is of prompt i.
            mask: [P * G, T] bool, True where real.

        Returns:
            [P * G, T + 1, H]: the normalised hidden states that predict each completion token, and
            after each; column t + 1 is the state *at* completion token t. Columns of what is not
            real hold the states of others. And [P * G, D] fp32: the embeddings.
        """
        share, lengths = 1, mask.sum(1).tolist()
        if not self.family.probed:  # of which it is known that they take a mask of one's own
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
        hidden, before, count = packed.unpack(states), None, None
        if self.reading.pooling == "mean":
            real = packed.prompts.attention_mask
            before = (wide(states[:, : real.shape[1]]) * real[..., None]).sum(1)
            before, count = (x.repeat_interleave(share, 0) for x in (before, real.sum(1)))
        return hidden, self.reading.pool(hidden, mask, before, count)


@lru_cache
def _cache_name(forward: Callable[..., Any]) -> str:
    """What a decoder's forward calls a cache; transformers has renamed it."""
    names = inspect.signature(forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def _begin_as_chat_end(model: PreTrainedModel, inputs: Inputs) -> None:
    """Give a new [RET] the rows of the token that it takes the place of: a model that can end an
    answer can then write it from the first step. Ours; the paper does not say."""
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.lm_head):
            table = cast(Tensor, part.weight)
            table[inputs.ret_id] = table[inputs.end_ids[0]]
