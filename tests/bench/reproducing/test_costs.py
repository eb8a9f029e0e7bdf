"""Estimates against the same numbers worked out by hand."""

from pathlib import Path

import pytest

from agiqa.bench.reproducing.costs import Cost, cost_of, rates, total_of
from agiqa.bench.reproducing.plan import read_plan
from agiqa.bench.reproducing.steps import plan_steps
from agiqa.extract.data.templates import template_of
from agiqa.heads.settings.config import TrainConfig

PLAN = read_plan()
STEPS = {step.name: step for step in plan_steps(PLAN, [*PLAN.tables], Path("root"), Path("out"))}


def cost(name):
    return cost_of(PLAN, STEPS[name])


def test_downloads():
    assert cost("fetch/MiniCPM-Llama3-V-2_5").download_bytes == pytest.approx(17.1e9)
    assert cost("fetch/minicpm2.5-agiqa-3k-ft").download_bytes == pytest.approx(2.2e9)
    assert cost("data/agiqa-3k") == Cost()


def test_descriptions():
    assert cost("describe/20k-quality").gpu_hours == pytest.approx(20000 / 20.8 / 3600)


def test_a_store_of_images_of_three_slices_and_one_description():
    """512 x 512 pixels are an overview and two slices, of 96 tokens and two marks each; text has 4.7 characters a token."""
    wording = template_of("quality")
    text = len(wording.describe) + rates().description_characters + len(wording.rate)
    tokens = 1 + round(text / 4.7) + 3 * 5 + 3 * (96 + 2) + 2 + 0
    found = cost("extract/2023-quality")
    assert found.gpu_hours == pytest.approx(2400 * (tokens * 11.3e-3 / 477 + 3 * 6.774e-3 / 3) / 3600, rel=0.01)
    rows, head = 2400 * tokens * (4096 * 2 + 5), 128256 * 4096 * 2
    assert found.disk_bytes == pytest.approx(0.69 * (rows + head), rel=0.01)


def test_a_conversation_with_three_descriptions_is_longer():
    assert cost("extract/3k-three").disk_bytes > cost("extract/3k-untuned").disk_bytes


def test_heads_of_a_grid():
    """Ours on AIGCIQA2023: five seeds of one xLSTM, on the split and on five folds, 20 epochs of four fifths of the items."""
    found = cost("ablate/ours-2023-quality")
    runs, epochs = 5 * (1 + 5), TrainConfig().epochs
    assert found.gpu_hours == pytest.approx(runs * epochs * 0.8 * 2400 * 0.572e-3 / 3600)
    assert found.disk_bytes == pytest.approx(runs * 4 * (512 * 128256 + 4096**2))
    released = cost("ablate/released-2023-quality")
    assert released.gpu_hours == pytest.approx(60 * 0.8 * 2400 * 56e-3 / 3600)


def test_a_transfer_trains_four_heads_for_each_seed():
    images = 0.8 * (2982 + 3 * 2400)
    assert cost("transfer/3k-to-2023").gpu_hours == pytest.approx(5 * images * TrainConfig().epochs * 0.572e-3 / 3600)


def test_networks_share_caches_of_one_size_and_downloads():
    first, second = cost("baseline/agiqa-3k/vgg16"), cost("baseline/agiqa-3k/resnet50")
    assert first.disk_bytes == pytest.approx(2982 * 256 * 256 * 3)
    assert (second.disk_bytes, second.download_bytes) == (0.0, pytest.approx(0.1e9))
    assert cost("baseline/aigciqa2023/vgg16").download_bytes == 0.0


def test_networks_take_all_crops_of_their_epochs_labels_seeds_and_folds():
    rate, runs = rates().networks["resnet50"], 2 * 5 * (1 + 5)
    crops = 0.8 * 2982 * 20 * runs
    assert cost("baseline/agiqa-3k/resnet50").gpu_hours == pytest.approx(crops / rate / 3600)
    options = {"epochs": 2, "alone-epochs": 1, "train-crops": 4, "seeds": 1, "no-pretrained": True, "image-size": 112}
    changed = PLAN.model_copy(update={"options": {"baseline": options}})
    found = cost_of(changed, STEPS["baseline/agiqa-3k/resnet50"])
    assert found.gpu_hours == pytest.approx(0.8 * 2982 * 3 * 4 * 2 / rate / 3600)
    assert found.download_bytes == 0.0
    assert cost_of(changed, STEPS["baseline/agiqa-3k/vgg16"]).disk_bytes == pytest.approx(2982 * 3 * 128**2)


def test_a_sum_leaves_out_what_is_unknown_and_names_the_steps():
    found = total_of(
        [("a", Cost(gpu_hours=1.0)), ("b", Cost(gpu_hours=None, disk_bytes=5.0)), ("c", Cost(disk_bytes=2.0))]
    )
    assert (found.gpu_hours, found.disk_bytes, found.download_bytes, found.unknown) == (1.0, 7.0, 0.0, ("b",))
