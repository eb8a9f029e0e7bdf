"""All closed forms by name, and the settings that they can have."""

import torch

from agiqa.errors import ConfigError
from agiqa.heads.closed.forms import FORMS, Form
from agiqa.heads.closed.heads import ClosedHead, Facts, Tensors, head_of
from agiqa.heads.closed.pooled import check_pooled
from agiqa.heads.closed.stack import LEFT_OUT, STACK, TFIDF, member_names
from agiqa.heads.closed.token_bags import has_token_ids
from agiqa.heads.closed.words import WORDS, word_notes
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.settings.config import HeadConfig


def form_of(config: HeadConfig, *, label: str, folds: int, device: torch.device) -> Form:
    """The form of a head in closed form, or the one whose residual a network learns. Raises UnknownName."""
    name, pooling = (config.encoder, config.pooling) if config.is_closed else (config.init or "", config.init_pooling)
    return FORMS.get(name)(config=config, pooling=pooling, label=label, folds=folds, device=device)


def check_form(config: HeadConfig) -> None:
    """Raise UnknownName or ConfigError for settings that closed forms, alone or as `init`, cannot have."""
    if config.init is not None:
        FORMS.get(config.init)
        if config.init == WORDS:
            message = f"`init` is {WORDS!r}, which is not fitted to the MOS: choose ridge, krr, tfidf or stack."
            raise ConfigError(message)
        if config.is_closed:
            message = f"`init` is {config.init!r}, and {config.encoder!r} is a closed form itself, without a residual."
            raise ConfigError(message)
        check_pooled(config.init_pooling)
    if config.is_closed:
        check_pooled(config.pooling)
    if STACK in (config.encoder, config.init):
        member_names(config)


def load_closed(tensors: Tensors, facts: Facts) -> ClosedHead:
    """The head of any form with this `state_dict` and these facts. Raises KeyError as `head_of`."""
    return head_of(tensors, facts)


def closed_notes(config: HeadConfig, source: FeatureSource, facts: Facts) -> list[str]:
    """What a reader of the scores must know about what a closed form with these `facts` reads of `source`."""
    name = config.encoder if config.is_closed else config.init
    if name == WORDS:
        return word_notes(source)
    found = [f"the stack does without {member}: {reason}" for member, reason in facts.get(LEFT_OUT, {}).items()]
    if TFIDF in facts.get("names", [name]) and not has_token_ids(source):
        found.append(f"tfidf counts the words of prompts and descriptions, as {location_of(source)} has no token ids")
    return found
