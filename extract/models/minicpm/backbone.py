"""The backbone `minicpm`: MiniCPM-Llama3-V-2.5 in its published layout."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from agiqa.extract.data.images import ImageSource, open_image
from agiqa.extract.data.items import Message
from agiqa.extract.models.adapters import apply_adapter
from agiqa.extract.models.batches import room_for_weights, uploaded
from agiqa.extract.models.contract import GenerationSettings, Prepared
from agiqa.extract.models.generation import generate
from agiqa.extract.models.huggingface import DTYPES, HuggingFaceBackbone
from agiqa.extract.models.loading import load_tokenizer
from agiqa.extract.models.minicpm.config import MiniCPMConfig
from agiqa.extract.models.minicpm.model import MiniCPMV
from agiqa.extract.models.minicpm.slicing import cut, patches_of, slicing_of
from agiqa.extract.models.minicpm.weights import check_weights, load_weights
from agiqa.extract.models.rendering import Renderer, refuse_marks
from agiqa.store import TOKEN_ROLES

_ANSWER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
"""The end of the published chat template, which asks for an answer whether one is wanted or not."""
_POSITIONS = "torch"
"""Who rounds the positions of patches (`line_positions`). Stores without this entry have some rounded otherwise."""


class MiniCPMBackbone(HuggingFaceBackbone):
    """An image as an overview and up to nine slices of 96 tokens each, before the first question."""

    kind = "minicpm"
    reads_images = True
    classes: Any = {MiniCPMConfig: MiniCPMV}  # noqa: RUF012 - as transformers' mappings in the other backbones
    packages = (*HuggingFaceBackbone.packages, "pillow")

    config: MiniCPMConfig

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`; without an image the model reads the text alone."""
        refuse_marks(conversation, self.config.marks.values())
        rendered = self.renderer.render(conversation, image=image is not None, answer=answer)
        ids, roles = self.renderer.tokenize(rendered)
        self.vocabulary.refuse_strangers(ids)
        if image is None:
            return Prepared(token_ids=ids, roles=roles)
        settings, picture = self.config, open_image(image)
        slicing = slicing_of(picture.size, most=settings.slices, resolution=settings.resolution, patch=settings.patch)
        pieces, sizes = zip(*(patches_of(piece, settings.patch) for piece in cut(picture, slicing)), strict=True)
        stand_in = self._stand_in(slicing.grid)
        place = int(np.flatnonzero(ids == self._ids["im_start"])[0])
        seen = np.where(stand_in == self._ids["unk"], TOKEN_ROLES["image"], TOKEN_ROLES["special"]).astype(np.uint8)
        return Prepared(
            token_ids=np.concatenate([ids[:place], stand_in, ids[place + 1 :]]),
            roles=np.concatenate([roles[:place], seen, roles[place + 1 :]]),
            inputs={"patches": torch.from_numpy(np.concatenate(pieces))},
            layout=np.array(sizes, np.int64),
        )

    def provenance(self) -> dict[str, Any]:
        """See `Backbone.provenance`."""
        seen = {"slices": self.config.slices, "resolution": self.config.resolution, "positions": _POSITIONS}
        return {**super().provenance(), "image": seen}

    def hollow(self) -> MiniCPMV:
        """See `HuggingFaceBackbone.hollow`."""
        with torch.device("meta"):
            return MiniCPMV(self.config)

    def _embedding_rows(self) -> int:
        return self.vocab_size

    def _compare_weights(self, model: MiniCPMV) -> None:
        check_weights(self.checkpoint, model)

    def load(self) -> None:
        """See `Backbone.load`."""
        if self._model is not None:
            return
        self.check_tensors()
        dtype = DTYPES[self.logical_dtype]
        with room_for_weights(self.checkpoint.name, self.device):
            model = load_weights(self.checkpoint, self.hollow(), dtype=dtype, device=self.device)
            if self.adapter is not None:
                apply_adapter(model, self.adapter, name=self.checkpoint.name)
        self._model = model

    def hidden_states(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """See `Backbone.hidden_states`. Padding is on the right, where no token of a causal model sees it."""
        model: MiniCPMV = self._loaded()
        with torch.inference_mode():
            states = model.llm.model(inputs_embeds=self._embedded(batch), use_cache=False).last_hidden_state
        return [states[row, : len(item.token_ids)] for row, item in enumerate(batch)]

    def logits(self, item: Prepared) -> torch.Tensor:
        """See `Backbone.logits`."""
        model: MiniCPMV = self._loaded()
        with torch.inference_mode():
            logits: torch.Tensor = model.llm(inputs_embeds=self._embedded([item]), use_cache=False).logits[0]
        return logits

    def generate(self, batch: Sequence[Prepared], settings: GenerationSettings) -> list[str]:
        """See `Backbone.generate`."""
        llm = self._language_model()

        def collate(items: Sequence[Prepared]) -> dict[str, torch.Tensor]:
            with torch.inference_mode():
                embedded = self._embedded(items)
            lengths = torch.tensor([len(item.token_ids) for item in items], device=self.device)
            mask = torch.arange(embedded.shape[1], device=self.device) < lengths[:, None]
            return {"inputs_embeds": embedded, "attention_mask": mask.long()}

        return generate(llm, self.renderer, batch, settings, collate=collate, positions=self.max_positions)

    def _language_model(self) -> Any:
        return self._loaded().llm

    def _embedded(self, batch: Sequence[Prepared]) -> torch.Tensor:
        """(batch, longest, D); slices of all items pass the vision tower together."""
        model: MiniCPMV = self._loaded()
        longest = max(len(item.token_ids) for item in batch)
        ids, seen = np.zeros((len(batch), longest), np.int64), np.zeros((len(batch), longest), bool)
        for row, item in enumerate(batch):
            ids[row, : len(item.token_ids)] = item.token_ids
            seen[row, : len(item.token_ids)] = item.roles == TOKEN_ROLES["image"]
        images = None
        seeing = [(item.inputs["patches"], item.layout) for item in batch if item.layout is not None]
        if seeing:
            patches = torch.cat([uploaded(patches, self.device) for patches, _ in seeing])
            attended = [np.full(len(sizes), sizes.prod(axis=1).max()) for _, sizes in seeing]
            images = model.image_tokens(
                patches, np.concatenate([sizes for _, sizes in seeing]), np.concatenate(attended)
            )
        return model.embed(ids, seen, images)

    def _stand_in(self, grid: tuple[int, int] | None) -> NDArray[np.int32]:
        """The tokens in place of an image: the overview, and a line for each row of slices."""
        ids = self._ids
        one = [ids["im_start"], *[ids["unk"]] * self.config.queries, ids["im_end"]]
        tokens = list(one)
        if grid is not None:
            columns, rows = grid
            tokens.append(ids["slice_start"])
            for row in range(rows):
                tokens += [ids["line"]] * (row > 0) + one * columns
            tokens.append(ids["slice_end"])
        return np.array(tokens, np.int32)

    def _make_renderer(self) -> Renderer:
        marks = self.config.marks
        tokenizer = load_tokenizer(self.checkpoint, transformers.PreTrainedTokenizerFast)
        self._ids: dict[str, int] = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in marks.items()}
        self._ids["line"] = tokenizer("\n", add_special_tokens=False)["input_ids"][0]
        template = tokenizer.chat_template
        if template is not None and template.endswith(_ANSWER):
            kept = template.removesuffix(_ANSWER)
            template = f"{kept}{{% if add_generation_prompt %}}{_ANSWER}{{% endif %}}"
        name = self.checkpoint.name
        return Renderer(name=name, tokenizer=tokenizer, template=template, image_token=marks["im_start"])
