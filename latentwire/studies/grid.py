"""Train and evaluate every combination of a few settings as trials of Ray Tune, and rank them.

    python latentwire/sweep.py --dry-run
    python latentwire/sweep.py --latent_lens 32,64 --d_zs 256 --samples 2000

A trial runs scripts/experiments/train_latentwire.sh, then latentwire/eval.py on articles of train that are not trained
on: dev chooses nothing. Writes a run folder a configuration, sweep_summary.json, sweep_results.csv and sweep.png. Run
again, it repeats no finished configuration, continues the others and tries failed ones once more. Ends with status 1 if
one failed. RAY_ADDRESS joins a cluster, whose machines need this checkout and the output folder at the same paths.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from latentwire.data.squad import Question, load_questions, split_by_article, subset
from latentwire.studies.ranking import ERROR, Ranking, is_finished
from latentwire.utils.runs import RunFolder, write_text
from latentwire.utils.settings import LONGEST_S, Configuration, SweepConfig, parse, require

ROOT = Path(__file__).parents[2]
# What all configurations share, as the launchers read it: settings, which make two sweeps the same one, and places.
SETTINGS = (
    "SOURCE", "DTYPE", "ENCODER_TYPE", "ENCODER_ID", "POOLING", "LR", "KD_WEIGHT", "SPAN_WEIGHT", "BATCH_SIZE",
    "SCORES_EPOCHS", "SCORES_SAMPLES", "INTERFACE", "INIT", "VAL_SAMPLES", "MAX_NEW_TOKENS",
)  # fmt: skip
PLACES = ("SQUAD_DIR", "MODELS_DIR", "LATENTWIRE_CACHE")
_OF_EVALUATION = ("SOURCE", "DTYPE", "BATCH_SIZE", "MAX_NEW_TOKENS")
# Times one pass of each M by the launchers' own functions; the other lists hardly change it.
_TIMING = """
source scripts/common.sh
training_settings
train codebook "$OUTPUT_DIR/codebook"
for LATENT_LEN in $LATENT_LENS; do
    train joint "$OUTPUT_DIR/M$LATENT_LEN" --init "$OUTPUT_DIR/codebook/checkpoint_best" --epochs 1 --estimate
done
"""
_LOG_LINES = 20  # of a failed program's log, in error.txt
_SAMPLES = 10_000


@dataclass(frozen=True)
class Program:
    """A command with what it adds to the environment."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]


def main() -> None:
    """Command line: one sweep."""
    sys.exit(sweep(parse(SweepConfig)))


def sweep(config: SweepConfig) -> int:
    """Run what is left of a sweep; 1 if a configuration failed, else 0.

    Raises ValueError where that takes over LONGEST_S on a CPU, unless the number of questions was chosen by hand.
    """
    by_hand, config = config.samples is not None, _resolved(config)
    folder, grid = Path(config.save_dir), config.grid
    todo = [configuration for configuration in grid if not is_finished(folder, configuration)]
    if config.dry_run:
        _dry_run(config, todo)
        return 0
    if todo and not by_hand and not config.gpus_per_trial and (hours := _hours(config, todo)) * 3600 > LONGEST_S:
        raise ValueError(
            f"samples: {len(todo)} configurations of {config.samples} questions would take about {hours:.1f} hours on "
            "this CPU; choose fewer, or the same number by hand to run them anyway (SAMPLES=..., --samples ...)"
        )
    dataset, questions = load_questions(config.dataset, "train")
    held = subset(split_by_article(questions)[1], config.eval_samples, config.seed)
    baselines = folder / "baselines" / f"dz{max(config.numbers('d_zs'))}"  # PCA's width; the widest is the strongest
    with RunFolder(folder, _identity(config, dataset, held), restart="by removing it (rm -r)"):
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


def _resolved(config: SweepConfig) -> SweepConfig:
    """Fill in what was left to the machine, and whole paths: the programs run elsewhere."""
    gpus = int(torch.cuda.is_available()) if config.gpus_per_trial is None else config.gpus_per_trial
    named = config.dataset in ("squad", "sample")
    return dataclasses.replace(
        config,
        samples=config.samples or _SAMPLES,
        gpus_per_trial=gpus,
        concurrent=config.concurrent or (None if gpus else 1),
        dataset=config.dataset if named else str(Path(config.dataset).resolve()),
        save_dir=str(Path(config.save_dir).resolve()),
    )


def _identity(config: SweepConfig, dataset: str, held: Sequence[Question]) -> dict:
    """What makes two sweeps the same one. The lists are left out: they may be extended."""
    kept = ("samples", "epochs", "eval_samples", "seed")
    return {name: getattr(config, name) for name in kept} | {
        "dataset": dataset,
        "questions_sha256": hashlib.sha256(repr(held).encode()).hexdigest()[:16],
        "llm_ids": list(config.llm_ids.items()),
        "processes": max(1, config.gpus_per_trial),
        **{name: os.environ.get(name) for name in SETTINGS},
    }


def _environment(config: SweepConfig) -> dict[str, str]:
    """What every program of a sweep finds in its environment, on whichever machine."""
    given = {name: os.environ[name] for name in (*SETTINGS, *PLACES) if name in os.environ}
    return given | {
        **{f"{name.upper()}_ID": llm_id for name, llm_id in config.llm_ids.items()},
        "PYTHON": _python(), "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "DATASET": config.dataset, "LLMS": config.llms, "SEED": str(config.seed), "SAMPLES": str(config.samples),
        "EPOCHS": str(config.epochs), "NPROC": str(max(1, config.gpus_per_trial)), "RESUME": "1",
    }  # fmt: skip


def _python() -> str:
    return os.environ.get("PYTHON") or sys.executable


def _programs(config: SweepConfig, configuration: Configuration, folder: Path) -> list[Program]:
    """Training and evaluation of one configuration."""
    varied = {
        "OUTPUT_DIR": str(folder), "LATENT_LEN": str(configuration.latent_len), "D_Z": str(configuration.d_z),
        "FIRST_TOKEN_CE_WEIGHT": str(configuration.first_token_ce_weight), "K": str(configuration.k),
    }  # fmt: skip
    script = ROOT / "scripts" / "experiments" / "train_latentwire.sh"
    return [
        Program(script.name, ["bash", str(script)], _environment(config) | varied),
        _evaluation(config, folder / "eval", "latentwire", "--ckpt", str(folder / "checkpoint_best")),
    ]


def _evaluation(config: SweepConfig, folder: Path, conditions: str, *flags: str) -> Program:
    """An evaluation on the questions that rank the configurations."""
    command = [
        _python(), str(ROOT / "latentwire" / "eval.py"), "--split", "held_out", "--dataset", config.dataset,
        "--llms", config.llms, "--samples", str(config.eval_samples), "--seed", str(config.seed),
        "--conditions", conditions, "--save_dir", str(folder), *flags,
    ]  # fmt: skip
    for name in _OF_EVALUATION:
        if os.environ.get(name):
            command += [f"--{name.lower()}", os.environ[name]]
    return Program("eval.py", command, _environment(config))


def _baselines(config: SweepConfig, folder: Path, ranking: Ranking) -> Program | None:
    """The evaluation of the rivals that need no training, at every M; None where it is there already."""
    sizes, widest = config.numbers("latent_lens"), max(config.numbers("d_zs"))
    wanted = {("text", None), *((name, m) for name in ("token_budget", "pca") for m in sizes)}
    if wanted <= {(row["condition"], row["m"]) for row in ranking.baseline_rows()}:
        return None
    conditions = ["text", *(f"{name}@{m}" for name in ("token_budget", "pca") for m in sizes)]
    return _evaluation(config, folder, ",".join(conditions), "--d_z", str(widest))


def _run_on_ray(config: SweepConfig, todo: Sequence[Configuration], shared: Program | None, ranking: Ranking) -> None:
    """First what the configurations share, then each of them as a trial with GPUs of its own."""
    ray, tune = _ray()
    folder = Path(config.save_dir)
    try:
        resources = _resources(
            [node["Resources"] for node in ray.nodes() if node["Alive"]], config.gpus_per_trial, config.concurrent
        )
        if shared:
            print("baselines ...", flush=True)
            task = ray.remote(num_cpus=resources["cpu"], num_gpus=resources["gpu"], max_retries=0)(_run)
            error = ray.get(task.remote(shared, folder / "baselines.log"))
            if error:
                raise ValueError(f"baselines: {error.splitlines()[0]}; see {folder / 'baselines.log'}")
        for configuration in todo:
            (folder / configuration.name / ERROR).unlink(missing_ok=True)
        ranking.write()
        plans = {c.name: _programs(config, c, folder / c.name) for c in todo}

        def trial(settings: Mapping[str, str]) -> dict[str, float]:
            name = settings["configuration"]
            return _train_and_evaluate(folder / name, plans[name])

        tune.Tuner(
            tune.with_resources(trial, resources),
            param_space={"configuration": tune.grid_search(list(plans))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=config.concurrent,
                trial_name_creator=_name_of,
                trial_dirname_creator=_name_of,
            ),
            run_config=tune.RunConfig(
                storage_path=str(folder / "ray"), callbacks=[_reporter(tune.Callback, ranking)], verbose=0
            ),
        ).fit()
    finally:
        ray.shutdown()


def _ray() -> tuple:
    """Ray and its Tune, started: quiet, and for this machine alone unless RAY_ADDRESS names a cluster."""
    address = os.environ.get("RAY_ADDRESS")
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1"}
    os.environ |= {"TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "RAY_AIR_NEW_OUTPUT": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {} if address else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # so that it stays on 127.0.0.1
    try:
        import ray  # a GPU machine may lack it
        from ray import tune
    except ImportError as error:
        raise ValueError(f'the sweep needs Ray Tune ({error}): pip install "ray[tune]"') from error
    of_its_own = {} if address else {"include_dashboard": False, "object_store_memory": 100_000_000}
    ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **of_its_own)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # failed trials are reported in our own words
    return ray, tune


def _resources(machines: Sequence[Mapping[str, float]], gpus: int, concurrent: int | None) -> dict[str, int]:
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


def _reporter(callback: type, ranking: Ranking) -> object:
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


def _train_and_evaluate(folder: Path, programs: Sequence[Program]) -> dict[str, float]:
    """In a worker of Ray: a configuration's programs, then its F1s. RuntimeError, and error.txt, if one fails.

    It uses nothing of ours that imports torch, which takes a worker seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for program in programs:
        error = _run(program, folder / "trial.log")
        if error:
            (folder / ERROR).write_text(error, encoding="utf-8")
            raise RuntimeError(error.splitlines()[0])
    results = json.loads((folder / "eval" / "results.json").read_text(encoding="utf-8"))
    return {f"f1_{row['llm']}": row["f1"] for row in results["results"]}


def _run(program: Program, log: Path) -> str | None:
    """Run a program, which adds to `log` and dies with this process; None, or what went wrong, in its first line."""
    log.parent.mkdir(parents=True, exist_ok=True)
    before = log.stat().st_size if log.is_file() else 0
    with subprocess.Popen(
        [sys.executable, str(ROOT / "latentwire" / "studies" / "keeper.py"), str(log), *program.command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env=os.environ | program.environment,
    ) as keeper:  # fmt: skip
        status = keeper.stdout.read().strip() or "unknown"
    if status == "0":
        return None
    said = [line for line in log.read_bytes()[before:].decode(errors="replace").splitlines() if line.strip()]
    reasons = (
        [line.removeprefix("error: ") for line in said if line.startswith("error: ")] or said or ["it said nothing"]
    )
    return "\n".join([f"{program.name} ended with status {status}: {reasons[-1]}", "", *said[-_LOG_LINES:]]) + "\n"


def _dry_run(config: SweepConfig, todo: Sequence[Configuration]) -> None:
    """Print all configurations and what those that are left will take."""
    for configuration in config.grid:
        print(configuration.name + ("" if configuration in todo else "  finished"), flush=True)
    hours = _hours(config, todo) if todo else 0.0
    print(
        f"about {hours:.1f} hours for {len(config.grid)} configurations of which {len(config.grid) - len(todo)} are "
        "finished; token scores, validations and evaluations come on top"
    )


def _hours(config: SweepConfig, todo: Sequence[Configuration]) -> float:
    """Time of the passes through the LLMs, from a few steps at each M; a teacher reads its texts once for each K."""
    sizes = list(dict.fromkeys(configuration.latent_len for configuration in todo))
    print(f"timing a few steps at M = {', '.join(map(str, sizes))} ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        varied = {
            "OUTPUT_DIR": folder, "LATENT_LENS": " ".join(map(str, sizes)), "LATENT_LEN": str(sizes[0]),
            "D_Z": str(min(config.numbers("d_zs"))), "K": str(max(config.numbers("ks"))),
        }  # fmt: skip
        program = Program("the timing", ["bash", "-euc", _TIMING], _environment(config) | varied)
        log = Path(folder) / "timing.log"
        error = _run(program, log)
        if error:
            raise ValueError(error.splitlines()[0])
        found = re.findall(r"estimate: (\d+) minutes for \d+ steps \((\d+) of them", log.read_text(encoding="utf-8"))
        assert len(found) == len(sizes), found
    minutes = {m: (int(whole), int(teacher)) for m, (whole, teacher) in zip(sizes, found, strict=True)}
    passes = sum(minutes[c.latent_len][0] - minutes[c.latent_len][1] for c in todo) * config.epochs
    teachers = len({c.k for c in todo}) * max(teacher for _, teacher in minutes.values())
    at_once = 1  # on a CPU they share its cores
    if config.gpus_per_trial:
        at_once = max(1, min(config.concurrent or len(todo), torch.cuda.device_count() // config.gpus_per_trial))
    return (passes + teachers) / at_once / 60
