"""Rating words: the bins, the parser, and scikit-learn as the second opinion on every metric."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, precision_score

from agiqa.errors import ConfigError, DataError
from agiqa.heads.evaluation.rating_words import RATING_WORD_METRICS, parse_rating_word, score_words
from agiqa.store.format.labels import RATING_WORDS

RANGES = st.sampled_from([(0.0, 5.0), (1.0, 5.0), (0.0, 100.0), (0.0, 1.0), (-3.0, 7.0)])


def opinion(truth, answered):
    """The metrics as scikit-learn has them, in the order of RATING_WORD_METRICS."""
    present = [word for word in RATING_WORDS if word in truth or word in answered]
    options = {"labels": present, "zero_division": 0}
    near = [
        word in RATING_WORDS and abs(RATING_WORDS.index(word) - RATING_WORDS.index(true)) <= 1
        for true, word in zip(truth, answered, strict=True)
    ]
    return [
        accuracy_score(truth, answered),
        np.mean(near),
        *(score(truth, answered, average="macro", **options) for score in (precision_score, f1_score)),
        *(score(truth, answered, average="weighted", **options) for score in (precision_score, f1_score)),
    ]


def word_of(mos, mos_range=(0.0, 5.0)):
    """The word that `score_words` takes a MOS for: the row of its confusion that has the item."""
    confusion = score_words(["?"], [mos], mos_range=mos_range)["confusion"]
    return next(word for word, row in confusion.items() if any(row.values()))


def test_the_bins_are_those_of_the_paper():
    expected = [
        (0, "bad"),
        (0.999, "bad"),
        (1, "poor"),
        (2, "fair"),
        (3, "good"),
        (3.99, "good"),
        (4, "excellent"),
        (5, "excellent"),
    ]
    assert [word_of(float(mos)) for mos, _ in expected] == [word for _, word in expected]
    assert [word_of(mos, (1.0, 5.0)) for mos in (1.0, 1.79, 1.8, 2.6, 3.4, 4.2, 5.0)] == [
        "bad",
        "bad",
        *RATING_WORDS[1:],
        "excellent",
    ]
    assert [word_of(float(mos), (0.0, 100.0)) for mos in (19.9, 20, 40, 60, 80)] == list(RATING_WORDS)


@given(mos_range=RANGES, shares=st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_words_rise_with_the_mos(mos_range, shares):
    low, high = mos_range
    first, second = (min(high, low + share * (high - low)) for share in sorted(shares))
    assert RATING_WORDS.index(word_of(first, mos_range)) <= RATING_WORDS.index(word_of(second, mos_range))


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        ("good", "good"),
        (" Good.\n", "good"),
        ("The quality is **EXCELLENT**!", "excellent"),
        ("_poor_", "poor"),
        ("Based on the image's lack of content, it would be rated as 'bad'.", "bad"),
        ("fairly good", "good"),
        ("Good, very good", "good"),
        ("\uff46\uff41\uff49\uff52", "fair"),
        ("It is good, with no artefacts", "good"),
        ("", None),
        ("3", None),
        ("goodness", None),
        ("poorly drawn", None),
        ("fair to good", None),
        ("not good", None),
        ("It isn't a bad picture", None),
        ("It isn\u2019t very good", None),
        ("unfair", None),
    ],
)
def test_answers_are_read_as_people_read_them(answer, word):
    assert parse_rating_word(answer) == word


@given(
    word=st.sampled_from(RATING_WORDS),
    form=st.sampled_from(["{}", "{}.", "The quality is {}.", '"{}"', "Rating: {}\n", "({})"]),
    change=st.sampled_from([str.upper, str.lower, str.title]),
)
def test_a_word_is_read_in_any_case_and_punctuation(word, form, change):
    assert parse_rating_word(change(form.format(word))) == word


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([*RATING_WORDS, "no idea"])), min_size=1, max_size=25),
    mos_range=RANGES,
)
def test_metrics_are_scikit_learns(pairs, mos_range):
    low, high = mos_range
    mos = [min(high, low + share * (high - low)) for share, _ in pairs]
    answers = [answer for _, answer in pairs]
    result = score_words(answers, mos, mos_range=mos_range)
    truth = [word_of(value, mos_range) for value in mos]
    assert [result[name] for name in RATING_WORD_METRICS] == pytest.approx(opinion(truth, answers), abs=1e-12)
    assert result["n"] == len(pairs)
    assert result["unknown"] == answers.count("no idea")
    assert sum(sum(row.values()) for row in result["confusion"].values()) == len(pairs)


def test_intervals_are_wilsons_for_so_many_independent_answers_as_prompts_are_worth():
    random = np.random.default_rng(0)
    mos = random.uniform(0, 5, 60)
    answers = [str(random.choice([*RATING_WORDS, "?"])) if random.uniform() < 0.4 else word_of(value) for value in mos]
    prompts = [f"prompt {k % 12}" for k in range(60)]
    result = score_words(answers, mos, prompts)
    without = []
    for left_out in range(12):
        kept = [k for k in range(60) if k % 12 != left_out]
        without.append(opinion([word_of(mos[k]) for k in kept], [answers[k] for k in kept]))
    variances = 11 / 12 * np.square(without - np.mean(without, axis=0)).sum(axis=0)
    quantile = stats.t.ppf(0.975, 11)
    for name, variance in zip(RATING_WORD_METRICS, variances, strict=True):
        share = result[name]
        worth = share * (1 - share) / variance
        for end in result["ci"][name]:
            assert abs(end - share) == pytest.approx(quantile * np.sqrt(end * (1 - end) / worth), abs=1e-9)
    assert "12 prompts only" in result["caution"]
    alone = score_words(answers, mos)
    assert alone["ci"] == score_words(answers, mos, [f"{k:02d}" for k in range(60)])["ci"]
    assert score_words(answers, mos, ["one prompt"] * 60)["ci"] == dict.fromkeys(RATING_WORD_METRICS)


def test_words_that_are_all_right_are_not_certain_to_stay_so():
    mos = np.linspace(0, 5, 30)
    result = score_words([word_of(value) for value in mos], mos)
    low, high = result["ci"]["accuracy"]
    assert (low, high) == (pytest.approx(30 / (30 + stats.t.ppf(0.975, 29) ** 2)), pytest.approx(1.0))


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(DataError, match="no answers"):
        score_words([], [])
    with pytest.raises(DataError, match="2 answers, 1 MOS and none prompts"):
        score_words(["good", "bad"], [3.0])
    with pytest.raises(DataError, match="1 answers, 1 MOS and 2 prompts"):
        score_words(["good"], [3.0], ["a", "b"])
    for wrong in (5.1, -0.1, float("nan")):
        with pytest.raises(DataError, match="1 of 2 MOS are outside 0 to 5"):
            score_words(["good", "good"], [3.0, wrong])
    for empty in ((5.0, 0.0), (1.0, 1.0), (0.0, float("inf"))):
        with pytest.raises(ConfigError, match="is empty"):
            word_of(3.0, empty)
