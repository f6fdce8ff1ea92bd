"""A sweep: every combination of a few settings is a trial of Ray Tune, and all of them are ranked.

A trial runs scripts/experiments/train_latentwire.sh, then latentwire/eval.py on articles of train that are not trained
on: dev chooses nothing.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import latentwire.data
from latentwire.data.question import Question, subset
from latentwire.data.registry import DATASETS
from latentwire.data.squad import load
from latentwire.evaluation.settings import EvalSettings
from latentwire.studies.programs import (
    ERROR,
    ROOT,
    Program,
    asked,
    program,
    python,
    run_kept,
    teacher_seconds,
    torchrun,
    train_and_evaluate,
    variables,
)
from latentwire.studies.scale.estimates import SAYS, predicted
from latentwire.studies.settings import SWEEP_SAMPLES, Configuration, SweepSettings
from latentwire.training.settings import LaunchSettings, TrainSettings
from latentwire.utils.cli import VARIABLES, Settings, fields_of, gpu_count, parse, refuse_long, require, variable_of
from latentwire.utils.cluster import start_ray
from latentwire.utils.files import write_text
from latentwire.utils.registry import import_all
from latentwire.utils.runs import RunFolder, digest, identity

if TYPE_CHECKING:
    from latentwire.studies.ranking import Ranking

# Settings that do not make two sweeps different ones. The lists may be extended.
_NO_PART = (
    "latent_lens", "d_zs", "ftce_weights", "ks", "llms", "wordings", "device", "gpus_per_trial", "concurrent",
    "save_dir", "dry_run", "time", "json",
)  # fmt: skip
_HOW = {"save_dir", "resume", "save_minutes", "tracker", "ignore_memory"}  # of a training, but not what it learns
_PLACES = [name for name in VARIABLES if name not in ("RAY_ADDRESS", "PYTHON", "BASE_PYTHON")]


def sweep(config: SweepSettings) -> int:
    """Run what is left of a sweep; 1 if a configuration failed, else 0.

    Raises ValueError where that takes over LONGEST_S on a CPU, unless the number of questions was chosen by hand.
    """
    by_hand, config = config.samples is not None, _resolved(config)
    folder, grid = Path(config.save_dir), config.grid
    todo = [configuration for configuration in grid if not configuration.is_finished(folder)]
    if config.dry_run:
        _dry_run(config, todo)
        return 0
    if todo and not by_hand and not config.gpus_per_trial:
        what = f"{len(todo)} configurations of {config.samples} questions"
        refuse_long(_seconds(config, todo), "cpu", by_hand, what)
    from latentwire.studies.ranking import Ranking  # slow to import, and --dry-run needs none

    judges = load(config.dataset, "held_out")
    held = subset(judges.questions, config.eval_samples, config.seed)
    baselines = folder / "baselines" / f"dz{max(config.numbers('d_zs'))}"  # PCA's width; the widest is the strongest
    with RunFolder(folder, _identity(config, judges.name, held)):
        ranking = Ranking(folder, grid, held, baselines, config.seed)
        print(f"{len(grid)} configurations, {len(grid) - len(todo)} of them finished; {folder}", flush=True)
        shared = _baselines(config, baselines, ranking)
        if todo or shared:
            _run_on_ray(config, todo, shared, ranking)
        summary = ranking.write()
        print(f"wrote {folder / 'sweep_summary.json'}, sweep_results.csv and {ranking.draw(summary).name}")
    for failed in summary["failed"]:
        print(f"failed: {failed['name']}: {failed['error']}; see {folder / failed['name'] / 'trial.log'}")
    return int(len(summary["ranked"]) < len(grid))


def _resolved(config: SweepSettings) -> SweepSettings:
    """Fill in what was left open, and whole paths: the programs run elsewhere."""
    import_all(latentwire.data)
    named = config.dataset in DATASETS
    return dataclasses.replace(
        config,
        samples=config.samples or SWEEP_SAMPLES,
        concurrent=config.concurrent or (0 if config.gpus_per_trial else 1),
        dataset=config.dataset if named else str(Path(config.dataset).resolve()),
        save_dir=str(Path(config.save_dir).resolve()),
    )


def _identity(config: SweepSettings, dataset: str, held: Sequence[Question]) -> dict:
    """What makes two sweeps the same one."""
    return identity(
        config, _NO_PART,
        dataset=dataset,
        questions_sha256=digest(held),
        llm_ids=list(config.llm_ids.items()),
        wordings=config.llm_wordings,
        processes=max(1, config.gpus_per_trial),
        inherited={name: text for name, text in _inherited(TrainSettings, _HOW) if text},
    )  # fmt: skip


def _inherited(cls: type[Settings], left_out: set[str]) -> Iterator[tuple[str, str]]:
    """Variables of a program, with what they are now, that are the same for all configurations: those of training that
    a sweep neither varies nor has a setting for."""
    own = {field.name for field in (*dataclasses.fields(SweepSettings), *dataclasses.fields(Configuration))}
    trained = {field.name for field in fields_of(TrainSettings)}
    for field in fields_of(cls):
        if variable_of(field) and field.name in trained - own - left_out:
            yield variable_of(field), os.environ.get(variable_of(field), "")


def _environment(config: SweepSettings, cls: type[Settings], varied: Mapping[str, object]) -> dict[str, str]:
    """What a program finds in its environment, on whichever machine: the sweep's own settings, what it varies, what is
    inherited, where things are, and else the defaults."""
    given = vars(config) | {"latent_lens": ""} | varied  # a trial has one M; a training's latent_lens are drawn among
    found = variables(cls, given, config.llm_ids) | dict(_inherited(cls, {"save_dir", "resume"}))
    return found | {name: os.environ[name] for name in _PLACES if os.environ.get(name)}


def _evaluation(config: SweepSettings, folder: Path, conditions: str, *flags: str) -> Program:
    """An evaluation on the questions that rank the configurations."""
    command = program(
        "eval", "--split", "held_out", "--samples", str(config.eval_samples), "--conditions", conditions,
        "--save_dir", str(folder), *flags,
    )  # fmt: skip
    return Program("eval.py", command, _environment(config, EvalSettings, {}))


def _programs(config: SweepSettings, configuration: Configuration, folder: Path) -> list[Program]:
    """Training and evaluation of one configuration."""
    script = ROOT / "scripts" / "experiments" / "train_latentwire.sh"
    varied = vars(configuration) | {"save_dir": str(folder)}
    launched = {"PYTHON": python(), "NPROC": str(max(1, config.gpus_per_trial))}
    return [
        Program(script.name, ["bash", str(script)], _environment(config, TrainSettings, varied) | launched),
        _evaluation(config, folder / "eval", "latentwire", "--ckpt", str(folder / "checkpoint_best")),
    ]


def _baselines(config: SweepSettings, folder: Path, ranking: "Ranking") -> Program | None:
    """The evaluation of the rivals that need no training, at every M; None where it is there already."""
    sizes, widest = config.numbers("latent_lens"), max(config.numbers("d_zs"))
    wanted = {("text", None), *((name, m) for name in ("token_budget", "pca") for m in sizes)}
    if wanted <= {(row["condition"], row["m"]) for row in ranking.baseline_rows()}:
        return None
    conditions = ["text", *(f"{name}@{m}" for name in ("token_budget", "pca") for m in sizes)]
    return _evaluation(config, folder, ",".join(conditions), "--d_z", str(widest))


def _run_on_ray(
    config: SweepSettings, todo: Sequence[Configuration], shared: Program | None, ranking: "Ranking"
) -> None:
    """First what the configurations share, then each of them as a trial with GPUs of its own."""
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    os.environ |= {"TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "RAY_AIR_NEW_OUTPUT": "0"}
    ray = start_ray("tune", 'pip install "ray[tune]"')
    tune = ray.tune
    folder = Path(config.save_dir)
    try:
        resources = _resources(
            [node["Resources"] for node in ray.nodes() if node["Alive"]], config.gpus_per_trial, config.concurrent
        )
        if shared:
            print("baselines ...", flush=True)
            task = ray.remote(num_cpus=resources["cpu"], num_gpus=resources["gpu"], max_retries=0)(run_kept)
            error = ray.get(task.remote(shared, folder / "baselines.log"))
            if error:
                raise ValueError(f"baselines: {error.splitlines()[0]}; see {folder / 'baselines.log'}")
        for configuration in todo:
            (folder / configuration.name / ERROR).unlink(missing_ok=True)
        ranking.write()
        plans = {c.name: _programs(config, c, folder / c.name) for c in todo}

        def trial(settings: Mapping[str, str]) -> dict[str, float]:
            name = settings["configuration"]
            return train_and_evaluate(folder / name, plans[name])

        tune.Tuner(
            tune.with_resources(trial, resources),
            param_space={"configuration": tune.grid_search(list(plans))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=config.concurrent or None,
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=tune.RunConfig(
                storage_path=str(folder / "ray"), callbacks=[_reporter(tune.Callback, ranking)], verbose=0
            ),
        ).fit()
    finally:
        ray.shutdown()


def _resources(machines: Sequence[Mapping[str, float]], gpus: int, concurrent: int) -> dict[str, int]:
    """What a trial has for itself: GPUs with their share of a machine's processors, or else a share of all."""
    able = [machine for machine in machines if machine.get("GPU", 0) >= gpus and machine.get("CPU", 0) >= 1]
    most = max((int(machine.get("GPU", 0)) for machine in machines), default=0)
    require(bool(able), "gpus_per_trial", gpus, f"no machine has so many, the largest has {most}")
    if gpus:
        return {"cpu": max(1, min(int(machine["CPU"] * gpus / machine["GPU"]) for machine in able)), "gpu": gpus}
    share = sum(machine["CPU"] for machine in able) / concurrent
    return {"cpu": max(1, int(min(share, *(machine["CPU"] for machine in able)))), "gpu": 0}


def _name_of(trial: object) -> str:
    return trial.config["configuration"]


def _reporter(callback: type, ranking: "Ranking") -> object:
    """Ray's callback that renews the ranking and prints a line whenever a trial ends."""

    class Reporter(callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: object, **info: object) -> None:
            ranking.report(_name_of(trial))

        def on_trial_error(self, iteration: int, trials: list, trial: object, **info: object) -> None:
            path = ranking.folder / _name_of(trial) / ERROR
            if not path.is_file():  # not the program failed but its worker, for example for lack of memory
                path.parent.mkdir(exist_ok=True)
                said = Path(trial.error_file).read_text(encoding="utf-8").splitlines()
                write_text(path, "\n".join(["Ray: " + next(filter(None, said[1:]), "no reason given"), *said]) + "\n")
            ranking.report(_name_of(trial))

    return Reporter()


def _dry_run(config: SweepSettings, todo: Sequence[Configuration]) -> None:
    """Print all configurations and what those that are left will take."""

    def say(line: str) -> None:
        print(line, file=sys.stderr if config.json else sys.stdout, flush=True)

    for configuration in config.grid:
        say(configuration.name + ("" if configuration in todo else "  finished"))
    seconds = _seconds(config, todo, say) if todo else 0.0
    finished = [configuration.name for configuration in config.grid if configuration not in todo]
    say(
        f"about {seconds / 3600:.1f} hours for {len(config.grid)} configurations of which {len(finished)} are "
        "finished; validations and evaluations come on top"
    )
    if not config.time:
        say(SAYS)
    if config.json:
        names = [configuration.name for configuration in config.grid]
        print(json.dumps({"configurations": names, "finished": finished, "seconds": seconds}))


def _seconds(config: SweepSettings, todo: Sequence[Configuration], say: Callable[[str], None] = print) -> float:
    """Time of the trainings, one at each M, which the other lists hardly change; a teacher reads its texts once for
    each K. With `time` a few steps are measured."""
    sizes = list(dict.fromkeys(configuration.latent_len for configuration in todo))
    if config.time:
        say(f"timing a few steps at M = {', '.join(map(str, sizes))} ...")
    others = {"d_z": min(config.numbers("d_zs")), "k": max(config.numbers("ks"))}
    rendezvous, processes = parse(LaunchSettings, []).rendezvous, max(1, config.gpus_per_trial)
    timing = torchrun(processes, rendezvous, "--stage", "all", "--estimate", "--json")
    found = {}
    for m in sizes:
        wanted = Program(
            f"the timing of M={m}", timing, _environment(config, TrainSettings, {"latent_len": m} | others)
        )
        found[m] = asked(wanted) if config.time else predicted(wanted, processes)
    teachers = len({c.k for c in todo}) * max(map(teacher_seconds, found.values()))
    passes = sum(found[c.latent_len]["seconds"] for c in todo)
    at_once = 1  # on a CPU they share its cores
    if config.gpus_per_trial:
        at_once = max(1, min(config.concurrent or len(todo), gpu_count() // config.gpus_per_trial))
    return (passes + teachers) / at_once
