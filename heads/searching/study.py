"""Optuna's study of a search, kept in a journal file: it proposes the trials, stops weak ones, and weighs the settings.

The journal is Optuna's own (`JournalStorage`), so its tools read it too. Each trial that ended has a line in it. Trials
that a kill has interrupted are proposed again.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from agiqa.errors import ConfigError, DataError
from agiqa.heads.searching.trials import TrialResult
from agiqa.store.disk.files import whole_lines

PRUNERS = ("median", "hyperband", "none")
Pruner = Literal["median", "hyperband", "none"]
FEWEST_FOR_IMPORTANCE = 10
"""With fewer complete trials the importance of settings says nothing."""
_LINE = "agiqa"
"""The attribute of a trial that holds its line."""
_NAME = "tune-head"
_RANDOM_TRIALS = 10
"""Trials at random before the sampler models the results."""
_UNPRUNED_TRIALS = 5
Line = dict[str, Any]


def check_optuna() -> None:
    """Raise ConfigError, with the way to install it, where the package optuna is missing."""
    if find_spec("optuna") is None:
        message = "A search needs the package optuna, and it is not installed: pip install 'agiqa[search]'"
        raise ConfigError(message)


class SearchStudy:
    """The study in the journal `path`, of this process alone."""

    def __init__(self, path: Path, *, seed: int, pruner: Pruner, epochs: int) -> None:
        """Open or create it. Raises DataError for a file that is no journal, and as `check_optuna`."""
        check_optuna()
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._seed = seed
        if path.exists() and len(whole := whole_lines(path)) < path.stat().st_size:
            os.truncate(path, len(whole))  # a kill tore the last line off
        try:
            lock: Any = _Unlocked()
            journal = JournalFileBackend(str(path), lock_obj=lock)
            storage = optuna.storages.JournalStorage(journal)
            self._study: Any = optuna.create_study(
                storage=storage,
                study_name=_NAME,
                direction="maximize",
                pruner=_pruner(pruner, epochs),
                load_if_exists=True,
            )
        except (AssertionError, ValueError, KeyError, TypeError) as error:  # as a line of another form raises
            message = f"{path} is no journal of a search ({error}). Choose another OUT, or remove it."
            raise DataError(message) from error

    def lines(self) -> list[Line]:
        """The lines of the trials that ended, in the order of their numbers."""
        trials = self._study.get_trials(deepcopy=False)
        return [trial.user_attrs[_LINE] for trial in trials if trial.state.is_finished() and _LINE in trial.user_attrs]

    def propose_again(self) -> int:
        """Close the trials that a kill has interrupted, and propose their settings first; returns how many."""
        import optuna

        running = [one for one in self._study.get_trials(deepcopy=False) if not one.state.is_finished()]
        waiting = [one for one in running if one.state == optuna.trial.TrialState.WAITING]
        interrupted = [one for one in running if one.state == optuna.trial.TrialState.RUNNING]
        for trial in interrupted:
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        known = [one.system_attrs.get("fixed_params") for one in waiting]
        for trial in interrupted:
            if trial.params not in known:
                self._study.enqueue_trial(trial.params)
        return len(interrupted)

    def propose(self, settings: Mapping[str, Any]) -> None:
        """Propose these settings next; the sampler chooses the others."""
        self._study.enqueue_trial(dict(settings))

    @property
    def is_new(self) -> bool:
        """Whether there is no trial."""
        return not self._study.get_trials(deepcopy=False)

    def ask(self) -> Any:
        """The next trial. The sampler depends on the seed and the trials that ended, not on interruptions."""
        import optuna

        trials = self._study.get_trials(deepcopy=False)
        ended, running = len(self.lines()), sum(one.state == optuna.trial.TrialState.RUNNING for one in trials)
        self._study.sampler = optuna.samplers.TPESampler(
            seed=_seed(self._seed, ended, running), n_startup_trials=_RANDOM_TRIALS
        )
        return self._study.ask()

    def judge(self, trial: Any, epoch: int, value: float) -> bool:
        """Note the validation SRCC after an epoch; whether the trial should stop."""
        trial.report(value, epoch)
        return bool(trial.should_prune())

    def tell(self, trial: Any, result: TrialResult, line: Line) -> None:
        """Note the end of a trial."""
        import optuna

        state = optuna.trial.TrialState
        trial.set_user_attr(_LINE, line)
        states = {"complete": state.COMPLETE, "pruned": state.PRUNED, "failed": state.FAIL}
        value = result.value if result.state == "complete" else None
        self._study.tell(trial, value, state=states[result.state])

    def importances(self) -> dict[str, float]:
        """The share of each searched setting in what the best tenth of the complete trials have in common (PED-ANOVA,
        Watanabe, Bansal & Hutter 2023, arXiv 2304.10255), descending; empty for too few trials.
        """
        import optuna

        complete = [line for line in self.lines() if line["state"] == "complete"]
        if len(complete) < FEWEST_FOR_IMPORTANCE or len({line["validation_srcc"] for line in complete}) == 1:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about few trials, which the caller says
            found = optuna.importance.get_param_importances(self._study)
        return {name: round(float(share), 4) for name, share in found.items()}


def _pruner(name: Pruner, epochs: int) -> Any:
    """The pruner of trials of so many epochs. The first are never stopped."""
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED_TRIALS, n_warmup_steps=max(2, epochs // 4))
    if name == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    return optuna.pruners.NopPruner()


class _Unlocked:
    """A lock for the journal that does nothing: the folder of the search has a lock that a kill releases."""

    def acquire(self) -> bool:
        """It is held."""
        return True

    def release(self) -> None:
        """Nothing to do."""


def _seed(*numbers: int) -> int:
    """One seed of 32 bits for these numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
