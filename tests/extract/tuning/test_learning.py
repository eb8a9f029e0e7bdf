"""Laws of one step and of the adapter, on every kind of backbone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from agiqa.errors import ModelError
from agiqa.extract.models.adapters import apply_adapter, resolve_adapter
from agiqa.extract.tuning.adapting import adapt, recompute, saved_name
from agiqa.extract.tuning.examples import example_of
from agiqa.extract.tuning.folder import AdapterFolder
from agiqa.extract.tuning.group import Group
from agiqa.extract.tuning.learner import Learner
from agiqa.extract.tuning.losses import computing, summed_loss, validation_sums
from agiqa.extract.tuning.schedule import Schedule
from tests.extract.tiny_models import TEXT_TEMPLATE, make_tokenizer, roomy, save, widths, write_text_checkpoint
from tests.extract.tiny_thinkers import HYBRID_TEMPLATE
from tests.extract.tuning.talks import load_talks, opener_for, quick

UNREAD = "model.vision_tower.post_layernorm"
"""Llava reads the patches before CLIP's last norm."""
RECIPES = {"minicpm": "published", "llava": "published", "llama": "light"}


@pytest.fixture(params=RECIPES)
def kind(request):
    """The kind of checkpoint."""
    return request.param


@pytest.fixture
def opener(kind, request):
    """Opens its checkpoint."""
    return opener_for(request.getfixturevalue(kind), **({"max_slices": 2} if kind == "minicpm" else {}))


@pytest.fixture
def items(kind, talks):
    """Four items for it."""
    return load_talks(talks, images=kind != "llama").items[:4]


def learner_of(opener, recipe, **options):
    backbone = opener(device="cpu", **options)
    backbone.load()
    return Learner(backbone, adapt(backbone, recipe, seed=0), recipe, Group())


def labels_of(examples):
    return sum(len(example.labels) for example in examples)


def step(learner, items, *, size=4, lr=1e-3):
    """One step on `items`, `size` at a time."""
    examples = [example_of(learner.backbone, item) for item in items]
    pieces = [(7, examples[start : start + size]) for start in range(0, len(examples), size)]
    found = learner.gradient(pieces, labels=labels_of(examples))
    learner.apply(lr)
    return found


def test_one_step_changes_all_that_is_trained_and_nothing_else(kind, opener, items):
    learner = learner_of(opener, quick(RECIPES[kind]))
    with torch.no_grad():  # LoRA's B begins at 0, so that A would have no gradient
        for name, weight in learner.trained.parameters.items():
            if ".lora_B." in name:
                weight.normal_(0, 0.02)
    model = learner.trained.model
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    step(learner, items)
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    unread = {name for name in learner.trained.parameters if kind == "llava" and name.startswith(UNREAD)}
    assert changed == set(learner.trained.parameters) - unread
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_the_loss_is_that_of_the_models_own_logits(kind, opener, items):
    """Against the logits of all positions, in float64, of the untouched model."""
    learner, plain = learner_of(opener, quick(RECIPES[kind])), opener(device="cpu")
    examples = [example_of(plain, item) for item in items]
    expected, right = 0.0, 0
    for example in examples:
        logits = plain.logits(example.prepared).double().log_softmax(dim=-1)
        places = torch.from_numpy(example.labels)
        ids = torch.from_numpy(example.targets.astype(np.int64))
        expected -= float(logits[places - 1, ids].sum())
        right += bool((logits[places - 1].argmax(dim=-1) == ids)[-example.rating :].all())
    learner.trained.model.eval()
    loss, hits = validation_sums(learner.backbone, examples)
    assert math.isclose(float(loss), expected, rel_tol=1e-5)
    assert int(hits) == right
    found = step(learner, items)
    assert math.isclose(found.loss, expected / labels_of(examples), rel_tol=1e-5)


def test_answers_that_are_learnt_alone(talks, tmp_path):
    """A template that leaves out thoughts of earlier answers: each answer passes at the end of its own conversation."""
    opener = opener_for(roomy(write_text_checkpoint(tmp_path, template=HYBRID_TEMPLATE.replace("<|im_end|>", "</s>"))))
    learner, plain = learner_of(opener, quick("light")), opener(device="cpu")
    items = load_talks(talks, images=False).items[:3]
    examples, expected, count = [example_of(plain, item) for item in items], 0.0, 0
    for item in items:
        for end in (2, 4):
            asked = plain.prepare(item.conversation[: end - 1], None, answer=True)
            whole = plain.prepare(item.conversation[:end], None)
            places = torch.arange(len(asked.token_ids), len(whole.token_ids) - 1)  # all but the last line break
            ids = torch.from_numpy(whole.token_ids.astype(np.int64))[places]
            expected -= float(plain.logits(whole).double().log_softmax(dim=-1)[places - 1, ids].sum())
            count += len(places)
    assert count == sum(example.count for example in examples)
    loss, hits = validation_sums(learner.backbone, examples)
    assert math.isclose(float(loss), expected, rel_tol=1e-5)
    assert hits.shape == ()
    found = learner.gradient([(7, examples[:2]), (8, examples[2:])], labels=count)
    assert math.isclose(found.loss, expected / count, rel_tol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("kind", ["llava", "llama"], indirect=True)
def test_five_steps_equal_a_plain_loop_of_transformers_and_peft(kind, opener, items):
    """peft's own model, transformers' own loss of each item, torch's clipping and AdamW, and the cosine by hand."""
    recipe = quick(RECIPES[kind], steps=5, lr=3e-3, warmup=0.4, clip=0.7)
    learner, plain = learner_of(opener, recipe), opener(device="cpu")
    config = LoraConfig(**learner.trained.config.to_dict() | {"inference_mode": False})
    model = get_peft_model(plain.loaded(), config).train()
    own = {_plain_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for name, weight in learner.trained.parameters.items():
            own[saved_name(name)].copy_(weight)  # the same draw of LoRA's A
    groups = [[one for one in own.values() if (one.ndim > 1) == wide] for wide in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": part, "weight_decay": 0.1 * wide} for part, wide in zip(groups, (1, 0), strict=True) if part],
        betas=(0.9, 0.95),
    )
    examples = [example_of(plain, item) for item in items]
    for step, lr in enumerate([1.5e-3, 3e-3, *(1.5e-3 * (1 + math.cos(math.pi * n / 3)) for n in range(3))]):
        losses = [_own_loss(model, example) * len(example.labels) for example in examples]
        loss = sum(losses) / labels_of(examples)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(own.values()), 0.7)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        found = learner.gradient([(7, examples[:3]), (8, examples[3:])], labels=labels_of(examples))
        assert (found.loss, found.norm) == pytest.approx((loss.item(), norm.item()), rel=1e-5)
        learner.apply(Schedule(recipe, items=4, seed=0).lr(step))
    pairs = [(weight, own[saved_name(name)]) for name, weight in learner.trained.parameters.items()]
    close = torch.cat([torch.isclose(one, other, rtol=1e-4, atol=1e-5).flatten() for one, other in pairs])
    assert close.float().mean() > 0.995  # AdamW makes a whole step of a gradient of 0 but for rounding (biases of keys)


def _plain_name(name):
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def _own_loss(model, example):
    """transformers' mean loss over the labels of one item."""
    ids = torch.from_numpy(example.prepared.token_ids.astype(np.int64))[None]
    labels = torch.full_like(ids, -100)
    labels[0, example.labels] = ids[0, example.labels]
    return model(input_ids=ids, labels=labels, **example.prepared.inputs).loss


def test_gradients_are_the_slopes_of_the_loss(kind, items, request, tmp_path):
    """By finite differences along the gradient of each part, for images of one and of several slices in one batch."""
    learner = learner_of(opener_for(request.getfixturevalue(kind)), quick(RECIPES[kind], clip=None))
    examples = []
    for item, size in zip(items, ((56, 56), (96, 96), (170, 60)), strict=False):
        if item.image is not None:
            path = tmp_path / item.image.name
            Image.open(item.image).resize(size).save(path)
            item = replace(item, image=path, image_sha256=None)
        examples.append(example_of(learner.backbone, item))
    if kind == "minicpm":
        assert [len(example.prepared.layout) for example in examples] == [1, 5, 4]
    learner.gradient([(7, examples)], labels=labels_of(examples))
    parts = [*learner.trained.whole, "lora_B"]

    def loss():
        with torch.no_grad():
            return float(summed_loss(learner.backbone, examples).double()) / labels_of(examples)

    for part in parts:
        weights = [weight for name, weight in learner.trained.parameters.items() if part in name]
        slopes = [weight.grad.clone() for weight in weights]
        norm = math.sqrt(sum(float(slope.double().square().sum()) for slope in slopes))
        found = []
        for sign in (1, -2, 1):  # there, to the other side, and back
            for weight, slope in zip(weights, slopes, strict=True):
                weight.data.add_(slope, alpha=sign * 0.002 / norm)
            found.append(loss())
        assert (found[0] - found[1]) / 0.004 == pytest.approx(norm, rel=0.02), part


def test_accumulation_equals_one_batch(kind, opener, items):
    whole, parts = (learner_of(opener, quick(RECIPES[kind])) for _ in range(2))
    together, apart = step(whole, items, size=4), step(parts, items, size=1)
    assert math.isclose(together.loss, apart.loss, rel_tol=1e-5)
    assert math.isclose(together.norm, apart.norm, rel_tol=1e-4)
    examples = [example_of(whole.backbone, item) for item in items]
    gradients = []
    for learner, size in ((whole, 4), (parts, 1)):
        pieces = [(7, examples[start : start + size]) for start in range(0, 4, size)]
        learner.gradient(pieces, labels=labels_of(examples))
        gradients.append([weight.grad for weight in learner.weights])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_recomputed_activations_change_nothing(kind, opener, items):
    """With dropout, whose draws must be repeated."""
    recipe = quick(RECIPES[kind], dropout=0.3)
    kept, again = (learner_of(opener, recipe) for _ in range(2))
    assert recompute(again.trained, "all") >= 2
    one, other = step(kept, items), step(again, items)
    assert (one.loss, one.norm) == pytest.approx((other.loss, other.norm), rel=1e-6)
    for name, weight in kept.trained.parameters.items():
        torch.testing.assert_close(weight, again.trained.parameters[name])
    assert recompute(again.trained, "vision") == (2 if kind != "llama" else 0)


def test_dropout_follows_its_seed(kind, opener, items):
    recipe = quick(RECIPES[kind], dropout=0.5, lr=0.01)
    learner = learner_of(opener, recipe)
    with torch.no_grad():
        for name, weight in learner.trained.parameters.items():
            if ".lora_B." in name:
                weight.normal_(0, 0.1)
    examples = [example_of(learner.backbone, item) for item in items]
    losses = [learner.gradient([(seed, examples)], labels=labels_of(examples)).loss for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


def test_merged_and_unmerged_forward_agree(kind, opener, items, tmp_path):
    learner = learner_of(opener, quick(RECIPES[kind], rank=8, alpha=4))
    for _ in range(3):
        step(learner, items, lr=1e-2)
    folder = AdapterFolder(tmp_path / "adapter", {})
    folder.save_adapter(tmp_path / "adapter", learner.trained.tensors(), learner.trained.config)
    learner.trained.model.eval()
    merged, plain = opener(device="cpu", adapter=str(tmp_path / "adapter")), opener(device="cpu")
    batch = [example_of(plain, item).prepared for item in items]
    with torch.no_grad():
        unmerged = learner.backbone.states(batch)
    for one, other, untouched in zip(merged.hidden_states(batch), unmerged, plain.hidden_states(batch), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert (one - untouched).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_peft_itself_reads_the_adapter(llama, talks, tmp_path):
    """The layout is PEFT's: its own model gives the same states as the merge."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    opener = opener_for(llama)
    items = load_talks(talks, images=False).items[:4]
    learner = learner_of(opener, quick("light", trains=["embeddings"]))
    for _ in range(3):
        step(learner, items, lr=1e-2)
    folder = tmp_path / "adapter"
    AdapterFolder(folder, {}).save_adapter(folder, learner.trained.tensors(), learner.trained.config)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), str(folder)).eval()
    prepared = example_of(learner.backbone, items[0]).prepared
    ids = torch.from_numpy(prepared.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        expected = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
    found = opener(device="cpu", adapter=str(folder)).hidden_states([prepared])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_quantised_weights_are_refused(llama):
    backbone = opener_for(llama)(device="cpu")
    backbone.load()
    layer = backbone.loaded().model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match="weights are quantised"):
        adapt(backbone, quick("light"), seed=0)


def test_embeddings_that_are_tied_are_trained_alone(talks, tmp_path):
    """The output embedding of a model with one table for both stays as it was, in training and after the merge."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEXT_TEMPLATE
    config = LlamaConfig(**widths(len(tokenizer)), tie_word_embeddings=True)
    opener = opener_for(roomy(save(tmp_path / "tied", LlamaForCausalLM, config, tokenizer)))
    learner = learner_of(opener, quick("light", trains=["embeddings"]))
    table = learner.trained.model.get_input_embeddings().weight
    head = learner.trained.model.get_output_embeddings().weight
    before = head.detach().clone()
    assert torch.equal(table, head)
    step(learner, load_talks(talks, images=False).items[:4], lr=1e-2)
    assert torch.equal(head, before)
    assert not torch.equal(table, head)
    folder = tmp_path / "adapter"
    AdapterFolder(folder, {}).save_adapter(folder, learner.trained.tensors(), learner.trained.config)
    plain = opener(device="cpu")
    plain.load()
    merged = apply_adapter(plain.loaded(), resolve_adapter(str(folder)), name="tied")
    assert torch.equal(merged.get_output_embeddings().weight, before)
    assert torch.equal(merged.get_input_embeddings().weight, table)


def test_bfloat16_computes_in_its_dtype_and_keeps_small_steps(minicpm, data):
    """Masters in float32: steps far below a bfloat16 digit add up. The residual streams stay in bfloat16."""
    learner = learner_of(opener_for(minicpm, max_slices=2), quick(lr=2e-6), dtype="bfloat16")
    backbone, model = learner.backbone, learner.trained.model
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    dtypes = {}
    for name in ("llm.model.layers.0", "llm.model.layers.1", "vpm.encoder.layers.1"):
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, given, kwargs, name=name: dtypes.update({name: [*given, *kwargs.values()][0].dtype}),
            with_kwargs=True,
        )
    before = {name: weight.detach().clone() for name, weight in learner.trained.parameters.items()}
    examples = [example_of(backbone, item) for item in data.items[:2]]
    with computing(backbone):
        assert summed_loss(backbone, examples).dtype == torch.float32
        assert {states.dtype for states in backbone.states([one.prepared for one in examples])} == {torch.bfloat16}
    assert set(dtypes.values()) == {torch.bfloat16}
    step(learner, data.items[:2], lr=2e-6)
    whole = [name for name in before if ".lora_" not in name]
    assert all(not torch.equal(before[name], learner.trained.parameters[name]) for name in whole)
    assert any(torch.equal(before[name].bfloat16(), learner.trained.parameters[name].bfloat16()) for name in whole)
