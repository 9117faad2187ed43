"""Images in prompts: the model's own processor makes tokens and pixels of them.

Every prompt is read by itself. Where prompts share a batch, what the processor would have made of the batch is
compared with their inputs put together (tracer/batch_inputs.py), and a difference is refused: families pad images in
ways of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .batch_inputs import cannot_join, is_along_tokens, joined_inputs
from .errors import InputError, ResourceError, UsageError
from .generate import Prompt, writes_otherwise
from .image_files import ImageFile, as_written
from .load import LoadedModel, quiet_transformers
from .prompts import PromptText, batches

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE = "image"
INSTALL = "pip install 'expertflow-trace[vision]'"


def image_reader(loaded: LoadedModel, texts: Sequence[PromptText]) -> ImageReader | None:
    """What reads the images of these prompts for a model; None if no prompt shows any.

    Raises InputError if the model sees none, ResourceError if its processor or Pillow is not there.
    """
    first = next((text.images[0] for text in texts if text.images), None)
    if first is None:
        return None
    sees = hasattr(loaded.model.config, "vision_config") or IMAGE in loaded.modalities.values()
    if not sees or writes_otherwise(loaded.model):
        how = "reads text only" if not sees else "is traced on text only"
        raise InputError(
            f"{first.where}: the prompt shows an image, but {loaded.shape.model_id} "
            f"({loaded.shape.architecture}) {how}. Leave `images` out, or choose a vision-language model."
        )
    _require_pillow()
    return ImageReader(_processor(loaded), loaded.modalities)


class ImageReader:
    """Reads prompts with images for one model. Implements prompts.ReadsImages.

    `modalities` labels the token ids that stand for something other than text: the processor's and those given.
    """

    def __init__(self, processor: Any, modalities: Mapping[int, str]) -> None:
        self._processor = processor
        self.modalities = {**dict.fromkeys(_image_ids(processor), IMAGE), **modalities}

    def read(self, prompt: PromptText, sequence: int, max_tokens: int) -> Prompt:
        """Token ids and model inputs of one prompt.

        Raises InputError for images that cannot be read, a prompt that the processor refuses, and one so long that the
        cut at `max_tokens` would fall into an image.
        """
        made = self._made([prompt])
        ids = tuple(made.pop("input_ids")[0].tolist())
        images = [place for place, token in enumerate(ids) if self.modalities.get(token) == IMAGE]
        if not images:
            raise InputError(
                f"{_name(prompt)}: its images left no token. The chat template does not write images out."
            )
        _require_apart(prompt, made)
        if images[-1] >= max_tokens:
            raise InputError(
                f"{_name(prompt)} has {len(ids):,} tokens with its images, {max_tokens:,} are fed at most, and the cut "
                "would fall into an image. Give fewer or smaller images, or put them first."
            )
        return Prompt(sequence, ids[:max_tokens], (), _first(made, len(ids), max_tokens))

    def require_batches(
        self, prompts: Sequence[Prompt], texts: Sequence[PromptText], size: int
    ) -> None:
        """Make sure that the prompts' images can share batches of `size`. Raises UsageError if they cannot."""
        for batch in batches(prompts, size):
            if len(batch) > 1 and any(prompt.inputs for prompt in batch):
                self._require_joined(batch, [texts[prompt.sequence] for prompt in batch])

    def _require_joined(self, batch: Sequence[Prompt], texts: Sequence[PromptText]) -> None:
        lengths = [len(prompt.token_ids) for prompt in batch]
        ours = joined_inputs([prompt.inputs for prompt in batch], lengths)
        try:
            theirs = self._made(texts)
        except InputError as cause:
            raise UsageError(
                f"These prompts cannot share a batch. {cause} Use --batch-size 1."
            ) from None
        # Cut prompts and those without images have other tokens here; along those nothing can be compared.
        is_whole = theirs.pop("input_ids").shape[1] == max(lengths)
        is_whole = is_whole and all(text.images for text in texts)
        for name in {*ours, *theirs}:
            if is_whole or not _is_along_tokens(name, batch):
                _require_same(name, ours.get(name), theirs.get(name))

    def _made(self, prompts: Sequence[PromptText]) -> dict[str, Any]:
        """What the processor makes of prompts of which some show images, padded at the left; no mask."""
        first = next(prompt for prompt in prompts if prompt.images)
        written = [self._written(prompt) if prompt.images else "." for prompt in prompts]
        pictures = [[_picture(image) for image in prompt.images] for prompt in prompts]
        # Chat templates write the special tokens themselves.
        text_kwargs: dict[str, Any] = {"add_special_tokens": not first.messages}
        if len(prompts) > 1:
            text_kwargs |= {"padding": True, "padding_side": "left"}
        try:
            with quiet_transformers():
                made = self._processor(
                    text=written, images=pictures, text_kwargs=text_kwargs, return_tensors="pt"
                )
        except Exception as cause:  # processors are programs, and raise what they like
            raise InputError(
                f"{_name(first)}: the model's processor refuses the prompt: {_line(cause)}"
            ) from None
        return {name: value for name, value in made.items() if name != "attention_mask"}

    def _written(self, prompt: PromptText) -> str:
        """The prompt's words with a mark for every image."""
        if prompt.messages:
            return self._conversation(prompt)
        mark = getattr(self._processor, "image_token", None)
        if mark is None or mark in prompt.text:
            return prompt.text
        return f"{mark}\n" * len(prompt.images) + prompt.text

    def _conversation(self, prompt: PromptText) -> str:
        if not getattr(self._processor, "chat_template", None):
            raise ResourceError(
                "The model's processor has no chat template, so conversations cannot be written out. Use a chat model, "
                "or give plain `text` with `images`, without --chat."
            )
        messages = [{"role": role, "content": as_written(said)} for role, said in prompt.messages]
        try:
            return self._processor.apply_chat_template(messages, add_generation_prompt=True)
        except Exception as cause:  # as above
            raise InputError(
                f"{_name(prompt)} does not fit the model's chat template: {_line(cause)}"
            ) from None


def _require_apart(prompt: PromptText, made: Mapping[str, Any]) -> None:
    """Families that count places by kinds of tokens take images side by side for one. Raises InputError for those."""
    kinds = made.get("mm_token_type_ids")
    if kinds is None:
        return
    is_image = (kinds[0] == 1).int()
    runs = int((is_image.diff() == 1).sum()) + int(is_image[0])
    if runs < len(prompt.images):
        raise InputError(
            f"{_name(prompt)}: {len(prompt.images)} images leave {runs} runs of tokens: some stand side by side. Put "
            "words or the model's own marks between them, or use --chat."
        )


def _first(made: Mapping[str, Any], whole: int, most: int) -> dict[str, Any]:
    """Inputs of the first `most` of `whole` tokens."""
    return {
        name: value[:, :most] if is_along_tokens(value, whole) else value
        for name, value in made.items()
    }


def _is_along_tokens(name: str, batch: Sequence[Prompt]) -> bool:
    return any(
        is_along_tokens(prompt.inputs[name], len(prompt.token_ids))
        for prompt in batch
        if name in prompt.inputs
    )


def _require_same(name: str, one: Any, other: Any) -> None:
    are_tensors = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
    if not are_tensors or one.shape != other.shape or not torch.equal(one, other):
        raise cannot_join(name)


def _picture(image: ImageFile) -> Image:
    """The image as the library's own loader gives it: turned as its camera says, in three colours."""
    from PIL import Image, ImageOps

    try:
        with Image.open(image.path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as cause:  # decoders raise what they like at damaged files
        raise InputError(
            f"{image.where}: {image.path} is no image that Pillow can read: {_line(cause)}"
        ) from None


def _processor(loaded: LoadedModel) -> Any:
    from transformers import AutoProcessor

    source = loaded.shape.model_id
    try:
        with quiet_transformers():
            found = AutoProcessor.from_pretrained(source, revision=loaded.shape.revision)
    except Exception as cause:  # as with the processor itself
        raise ResourceError(
            f"The processor of {source!r}, which prepares images, could not be loaded: {_line(cause)} It wants "
            f"processor_config.json or preprocessor_config.json beside the weights, and for some families "
            f"torchvision ({INSTALL})."
        ) from None
    if not (hasattr(found, "image_processor") and hasattr(found, "tokenizer")):
        raise ResourceError(
            f"{source!r} has no processor that prepares images (processor_config.json, preprocessor_config.json), so "
            "prompts with `images` cannot be read. Fetch the whole repository, or leave the images out."
        )
    return found


def _require_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ResourceError(f"Reading images needs Pillow: {INSTALL}") from None


def _image_ids(processor: Any) -> list[int]:
    many = getattr(processor, "image_token_ids", None) or []
    found = [*many, getattr(processor, "image_token_id", None)]
    return [token for token in found if isinstance(token, int)]


def _name(prompt: PromptText) -> str:
    return f"{prompt.images[0].where}, prompt {prompt.prompt_id!r}"


def _line(cause: Exception) -> str:
    """The first line of what went wrong, as a sentence."""
    lines = str(cause).strip().splitlines()
    first = lines[0] if lines else type(cause).__name__
    return first if first.endswith(".") else f"{first}."
