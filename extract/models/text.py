"""The backbone `text`: any transformers causal language model; it reads the conversation and no image."""

from collections.abc import Sequence

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from agiqa.extract.data.images import ImageSource
from agiqa.extract.data.items import Message
from agiqa.extract.models.contract import Prepared
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.loading import load_tokenizer
from agiqa.extract.models.rendering import Renderer


class TextBackbone(HuggingFaceBackbone):
    """A causal language model from the official layout or from a GGUF file."""

    kind = "text"
    reads_images = False
    auto_class = transformers.AutoModelForCausalLM
    classes = MODEL_FOR_CAUSAL_LM_MAPPING

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`; `image` is not looked at."""
        del image
        token_ids, roles = self.renderer.tokenize(self.renderer.render(conversation, answer=answer))
        self.vocabulary.refuse_strangers(token_ids)
        return Prepared(token_ids=token_ids, roles=roles)

    def _make_renderer(self) -> Renderer:
        tokenizer = load_tokenizer(self.checkpoint)
        return Renderer(name=self.checkpoint.name, tokenizer=tokenizer, template=tokenizer.chat_template)
