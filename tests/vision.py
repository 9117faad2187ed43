"""Tiny random vision-language models with the library's own processors, and pictures to show them.

Their tokenizer has a token per byte, with image marks in place of the last bytes. Processors make small images.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers.utils.import_utils import is_torchvision_available

from .families import SERVED, config_of, model_class, stir
from .models import root

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def _words(**marks: str) -> transformers.PreTrainedTokenizerFast:
    """A token per byte and one per mark; `marks` are the names by which processors ask for them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<eos>", "<pad>", *alphabet[: -len(marks)], *marks.values()]
    vocab = {token: place for place, token in enumerate(tokens)}
    inner = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", extra_special_tokens=marks
    )


def _mistral(config: Any) -> Any:
    """Images of any size, padded to the largest, with a mark at the end of each row of patches."""
    marks = {"image": "[IMG]", "image_break": "[BREAK]", "image_end": "[END]"}
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessorPil(
            size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}
        ),
        tokenizer=_words(**{f"{name}_token": mark for name, mark in marks.items()}),
        patch_size=config.vision_config.patch_size,
        spatial_merge_size=config.spatial_merge_size,
        **{f"{name}_token": mark for name, mark in marks.items()},
        chat_template=TEMPLATE.replace("MARK", "[IMG]"),
    )


def _aria(config: Any) -> Any:
    """Images of one size with a mask, four tokens each."""
    config.vision_config.image_size, config.vision_config.patch_size = 980, 245
    config.projector_patch_to_query_dict = {16: 4}
    return transformers.AriaProcessor(
        image_processor=transformers.AriaImageProcessorPil(),
        tokenizer=_words(image_token="<img>"),
        size_conversion={980: 4},
        chat_template=TEMPLATE.replace("MARK", "<img>"),
    )


def _qwen(config: Any) -> Any:
    """Images as a list of patches with their grid; positions have three axes."""
    marks = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    patch = config.vision_config.patch_size
    side = {
        "patch_size": patch,
        "size": {"shortest_edge": 4 * patch**2, "longest_edge": 64 * patch**2},
    }
    words = _words(**marks)
    for name in ("vision_start", "vision_end"):
        setattr(config, f"{name}_token_id", words.convert_tokens_to_ids(f"<|{name}|>"))
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessorPil(**side),
        tokenizer=words,
        video_processor=transformers.Qwen3VLVideoProcessor(patch_size=patch),
        chat_template=TEMPLATE.replace("MARK", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


_PROCESSORS: dict[str, Callable[[Any], Any]] = {"aria": _aria}
if is_torchvision_available():  # which these processors want
    _PROCESSORS |= {"mistral_large4": _mistral, "qwen3_vl_moe": _qwen}
FAMILIES = tuple(family for family in _PROCESSORS if family in SERVED)


@functools.cache
def folder(family: str) -> Path:
    """Folder of the family's tiny model with its processor. Treat it as read-only."""
    config = copy.deepcopy(config_of(family))
    processor = _PROCESSORS[family](config)
    config.image_token_id = processor.image_token_id
    torch.manual_seed(0)
    model = model_class(family)(config).eval()
    stir(model)
    path = root() / f"vision-{family}"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def picture(path: Path, width: int = 56, height: int = 40, shade: int = 0) -> Path:
    """Write a picture with a gradient, so that no two places of it look alike."""
    image = Image.new("RGB", (width, height))
    image.putdata(
        [
            ((shade + 4 * x) % 256, (5 * y) % 256, (x * y + shade) % 256)
            for y in range(height)
            for x in range(width)
        ]
    )
    image.save(path)
    return path
