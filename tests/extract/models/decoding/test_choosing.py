"""The next token of a row, against the logit processors of transformers and by counting draws."""

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from agiqa.extract.models import GenerationSettings
from agiqa.extract.models.decoding.choosing import Policy, choose, likeliest, uniform

ROWS, WORDS = 4, 500
SETTINGS = {
    "published": GenerationSettings.published(),
    "nucleus": GenerationSettings(sample=True, temperature=0.7, top_p=0.8),
    "the likeliest": GenerationSettings(sample=True, temperature=1.5, top_k=20),
    "penalty": GenerationSettings(sample=True, top_k=50, top_p=0.9, repetition_penalty=1.8),
    "all": GenerationSettings(sample=True, temperature=2.0),
}


def of_transformers(settings, logits, said):
    """(n, V) probabilities by the processors that `generate` of transformers uses, in its order."""
    processors = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    processors.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        processors.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        processors.append(TopPLogitsWarper(settings.top_p))
    return processors(said, logits.clone()).softmax(-1)


def numbers(rows=ROWS, start=0):
    return torch.full((rows,), 11), torch.arange(start, start + rows)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("sharp", [0.5, 4.0])
def test_the_same_tokens_with_the_same_probabilities(name, sharp):
    settings = SETTINGS[name]
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(ROWS, WORDS, generator=random) * sharp
    ids = torch.randint(0, WORDS, (ROWS, 40), generator=random)
    expected = of_transformers(settings, logits, ids)
    said = torch.zeros(ROWS, WORDS, dtype=torch.bool).scatter_(1, ids, value=True)
    worse = torch.where(logits < 0, logits * settings.repetition_penalty, logits / settings.repetition_penalty)
    kept, order = likeliest(torch.where(said, worse, logits) / settings.temperature, Policy.of(settings))
    found = kept.softmax(-1)
    found = found if order is None else torch.zeros(ROWS, WORDS).scatter_(1, order, found)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_probabilities(name):
    """20,000 draws of one distribution: each token's share is within five standard deviations."""
    settings, draws = SETTINGS[name], 20_000
    random = torch.Generator().manual_seed(4)
    logits, ids = torch.randn(1, 40, generator=random) * 2, torch.randint(0, 40, (1, 8), generator=random)
    said = torch.zeros(1, 40, dtype=torch.bool).scatter_(1, ids, value=True)
    expected = of_transformers(settings, logits, ids)[0]
    seeds, places = numbers(draws)
    many = {"said": said.expand(draws, -1), "seeds": seeds, "numbers": places}
    chosen = choose(logits.expand(draws, -1), Policy.of(settings), **many)
    shares = torch.bincount(chosen, minlength=40) / draws
    assert not shares[expected == 0].any()
    assert ((shares - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 1e-9).all()


def test_ties_at_the_last_place_are_all_kept_as_in_transformers():
    logits = torch.zeros(1, WORDS)
    logits[0, :3] = 5.0
    logits[0, 3:9] = 4.0
    settings = GenerationSettings(sample=True, top_k=5)
    kept, _ = likeliest(logits, Policy.of(settings))
    assert (kept > float("-inf")).sum() == 9
    assert (of_transformers(settings, logits, torch.zeros(1, 1, dtype=torch.long)) > 0).sum() == 9


def test_a_draw_depends_on_seed_and_number_and_not_on_its_row():
    policy, random = Policy.of(SETTINGS["published"]), torch.Generator().manual_seed(5)
    logits = torch.randn(6, WORDS, generator=random)
    said, seeds, places = torch.zeros(6, WORDS, dtype=torch.bool), torch.arange(6) * 10**15, torch.arange(6)
    together = choose(logits, policy, said=said, seeds=seeds, numbers=places)
    for row in range(6):
        one = slice(row, row + 1)
        alone = choose(logits[one], policy, said=said[one], seeds=seeds[one], numbers=places[one])
        assert torch.equal(alone, together[one])


def test_greedy_with_a_penalty_as_transformers():
    random = torch.Generator().manual_seed(6)
    logits, ids = torch.randn(ROWS, WORDS, generator=random), torch.randint(0, WORDS, (ROWS, 300), generator=random)
    said = torch.zeros(ROWS, WORDS, dtype=torch.bool).scatter_(1, ids, value=True)
    expected = RepetitionPenaltyLogitsProcessor(5.0)(ids, logits.clone()).argmax(-1)
    policy = Policy.of(GenerationSettings(repetition_penalty=5.0, temperature=3.0, top_k=7))
    seeds, places = numbers()
    assert torch.equal(choose(logits, policy, said=said, seeds=seeds, numbers=places), expected)
    assert not torch.equal(expected, logits.argmax(-1))


def split_mix(seed, number):
    """By Python's own integers."""
    state = (seed + (number + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return ((state ^ (state >> 31)) >> 11) * 2.0**-53


def test_uniform_numbers_are_those_of_split_mix():
    seeds = torch.tensor([0, 1, 2**56 - 1, 2**62 + 12345] * 50)
    places = torch.arange(200)
    found = uniform(seeds, places).tolist()
    assert found == [split_mix(seed, place) for seed, place in zip(seeds.tolist(), places.tolist(), strict=True)]
    many = uniform(torch.zeros(100_000, dtype=torch.long), torch.arange(100_000))
    counts = torch.histc(many.float(), 20, 0, 1)
    assert (counts - 5000).abs().max() < 5 * (5000 * 0.95) ** 0.5
