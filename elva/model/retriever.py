"""The retriever: a Qwen2-VL model that ends what it writes with [RET] and is read out there.

Liu et al., ELVA, arXiv:2606.20280, sec. 3.4: the model is asked to analyse and summarise its input
and to end with a registered special token; the hidden state at that token is the embedding.

A model that starts from nothing (`create`) is written to disk as an ordinary checkpoint and read
back by `Retriever.load`, the same call that reads Qwen2-VL-2B: nothing here knows how large a model
is.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from elva.model.inputs import RET, Inputs, Prompt, PromptBatch, token_id
from elva.model.packing import completions_a_reading, pack
from elva.model.vision import FeatureFile, Features, each_alone, fingerprint
from elva.recipe import LoraSettings, ScratchModel

PROMPT_FILE = "elva.json"
"""Beside the weights: how a checkpoint wants to be asked (written by `Retriever.save`)."""

QWEN_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

SCRATCH_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
)
"""Qwen2-VL's chat template without its system prompt and roles: five tokens instead of fifteen."""


WORDS = r" ?[\w'\u2019-]+| ?[^\s\w]+|\s+"
"""What byte pairs are merged within, in a tokenizer of our own."""


P, T = ParamSpec("P"), TypeVar("T")


class Retriever(nn.Module):
    """A Qwen2-VL model, what it reads (`inputs`) and the features of pictures it has seen."""

    def __init__(self, model: Qwen2VLForConditionalGeneration | PeftModel, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.train_vision = False
        self.name = ""
        self.features = Features()

    def forward(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """`work(...)`: whatever touches weights runs in such a call, which is what a wrapper of
        several processes (DDP, FSDP2, DeepSpeed) sees of the model."""
        return work(*args, **kwargs)

    # -- files -------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, path: str | Path, *, summary_prompt: str | None = None, inputs: Inputs | None = None
    ) -> Retriever:
        """Read a checkpoint directory or a hub name.

        Args:
            summary_prompt: how the model is asked to summarise; None takes the checkpoint's own.
            inputs: of an earlier model of the same run, to tokenise nothing twice.
        """
        if inputs is None:
            saved = Path(path) / PROMPT_FILE
            if summary_prompt is None:
                known = saved.is_file()
                summary_prompt = json.loads(saved.read_text())["summary_prompt"] if known else ""
            inputs = Inputs.load(path, summary_prompt)
        model = Qwen2VLForConditionalGeneration.from_pretrained(path, dtype="auto")
        if len(inputs.tokenizer) > model.lm_head.out_features:
            model.resize_token_embeddings(len(inputs.tokenizer), mean_resizing=False)
        if inputs.ret_is_new and not (Path(path) / PROMPT_FILE).is_file():
            _begin_as_chat_end(model, inputs)
        gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun's, one process a GPU
        device = torch.device(gpu if torch.cuda.is_available() else "cpu")
        retriever = cls(model.eval().to(device), inputs)
        retriever.name = str(path)
        return retriever

    def save(self, path: Path) -> None:
        """Write weights (safetensors), tokenizer and processor; an adapter is merged first, on a
        copy. A model of which a part was trained, and so is in fp32, is written in fp32 whole."""
        model = self.merged()
        kinds = {p.dtype for p in model.parameters()}
        (model.float() if len(kinds) > 1 else model).save_pretrained(path, safe_serialization=True)
        self.inputs.save(path)
        (path / PROMPT_FILE).write_text(json.dumps({"summary_prompt": self.inputs.summary_prompt}))

    def merged(self) -> Qwen2VLForConditionalGeneration:
        """The plain model: itself, or a copy with the LoRA adapter merged into the weights."""
        if not isinstance(self.model, PeftModel):
            return self.model
        return copy.deepcopy(self.model).merge_and_unload()

    def add_lora(self, settings: LoraSettings) -> None:
        """Put a fresh adapter on the language model; the rows of [RET] are trained beside it, that
        of the head too where it has rows of its own."""
        row = [self.inputs.ret_id]
        tied = self.plain.lm_head.weight is self.plain.get_input_embeddings().weight
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
            trainable_token_indices={"embed_tokens": row} | ({} if tied else {"lm_head": row}),
        )
        self.model = get_peft_model(self.plain, config)

    def train_in_fp32(self) -> None:
        """Keep what is trained in fp32, whatever the checkpoint's dtype: bf16 swallows updates
        smaller than 1/256 of a weight."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.embedding_dtype)

    @property
    def plain(self) -> Qwen2VLForConditionalGeneration:
        """The transformers model, with an adapter's layers inside it where there is one."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return cast(Qwen2VLForConditionalGeneration, model)

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
        """{picture: [tokens, H]}, the vision tower once per distinct picture.

        While the tower trains, many at once and with gradients; a frozen one's are kept, each
        made alone and without autocast.
        """
        if self.train_vision:
            wanted, found = list(dict.fromkeys(images)), dict[str, Tensor]()
            for start in range(0, len(wanted), 256):
                some = wanted[start : start + 256]
                patches, grids = zip(*map(self.inputs.patches, some), strict=True)
                features = self._tower(torch.cat(patches), torch.stack(grids))
                found.update(zip(some, features, strict=True))
            return found
        return self.features.get(images, self._frozen_features, self.device)

    def _frozen_features(self, images: Sequence[str]) -> list[Tensor]:
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return each_alone(self._tower, map(self.inputs.patches, images))

    def _tower(self, patches: Tensor, grids: Tensor) -> Sequence[Tensor]:
        out = self.plain.model.get_image_features(patches.to(self.device), grids.to(self.device))
        return list(out.pooler_output)

    def hold(self, prompts: Iterable[Prompt]) -> None:
        """Make a step's features at once, and keep them until the next step's."""
        images = [p.image for p in prompts if p.image is not None]
        if not self.train_vision:
            self.features.hold(images)
            self.image_features(images)

    def freeze_vision(self, frozen: bool, features: Path | None = None) -> None:
        """Choose whether the vision tower learns; either way features of earlier weights are
        dropped.

        Args:
            features: a directory in which a frozen tower's are kept from run to run.

        Raises:
            UserError: it holds what cannot be read.
        """
        self.train_vision = not frozen
        visual = self.plain.model.visual
        file = None
        if frozen and features is not None:
            preprocessing = self.inputs.image_processor.to_json_string()
            file = FeatureFile(features, fingerprint(visual, preprocessing))
        self.features = Features(file, self.inputs.content)
        for parameter in visual.parameters():
            parameter.requires_grad_(not frozen)

    def inputs_embeds(self, batch: PromptBatch) -> Tensor:
        """Token embeddings [R, L, H] with each picture's features in its placeholders."""
        embeds = self.plain.get_input_embeddings()(batch.input_ids)
        images = [i for i in batch.images if i is not None]
        if not images:
            return embeds
        features = self.image_features(images)
        mask = (batch.input_ids == self.plain.config.image_token_id)[..., None]
        rows = torch.cat([features[i] for i in images]).to(embeds.dtype)
        return embeds.masked_scatter(mask, rows)

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
        language, lengths = self.plain.model.language_model, mask.sum(1).tolist()
        share = completions_a_reading(
            language.config, prompts.input_ids.shape[1], lengths, len(mask) // len(prompts)
        )
        packed = pack(prompts, completions, mask, share, self.inputs.tokenizer.pad_token_id)
        written = self.plain.get_input_embeddings()(packed.completion_ids)
        out = language(
            inputs_embeds=torch.cat([self.inputs_embeds(packed.prompts), written], dim=1),
            attention_mask=packed.attention_mask,
            position_ids=packed.position_ids,
            use_cache=False,
        )
        return packed.unpack(out.last_hidden_state)


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


def create(
    path: Path, spec: ScratchModel, texts: Iterable[str], *, summary_prompt: str, seed: int
) -> None:
    """Write a randomly initialised Qwen2-VL with a tokenizer trained on `texts` as a checkpoint."""
    tokenizer = _train_tokenizer(texts, spec.vocabulary)
    ids = {token: token_id(tokenizer, token) for token in QWEN_TOKENS}
    head = spec.hidden_size // spec.heads
    half = head // 2
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": spec.layers,
            "num_attention_heads": spec.heads,
            "num_key_value_heads": spec.heads,
            "max_position_embeddings": 512,
            "initializer_range": spec.initializer_range,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": spec.vision_layers,
            "embed_dim": spec.vision_size,
            "num_heads": spec.vision_heads,
            "hidden_size": spec.hidden_size,
            "patch_size": spec.patch_size,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "initializer_range": spec.initializer_range,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2VLForConditionalGeneration(config)
    pixels = spec.image_size**2
    processor = Qwen2VLImageProcessorPil(
        patch_size=spec.patch_size,
        merge_size=2,
        temporal_patch_size=1,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[spec.image_mean] * 3,
        image_std=[spec.image_std] * 3,
    )
    Retriever(model, Inputs(tokenizer, processor, summary_prompt)).save(path)


def _begin_as_chat_end(model: Qwen2VLForConditionalGeneration, inputs: Inputs) -> None:
    """Give a new [RET] the rows of the token that it takes the place of: a model that can end an
    answer can then write it from the first step. Ours; the paper does not say."""
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.lm_head):
            table = cast(Tensor, part.weight)
            table[inputs.ret_id] = table[inputs.end_ids[0]]


def _train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE, as Qwen2's, in lower case and with whole hyphenated words: at this size a
    capital letter is a lost row, and every token of a summary a decoding step."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Prepend(" ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*QWEN_TOKENS, RET],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*QWEN_TOKENS[1:], RET],
        chat_template=SCRATCH_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
