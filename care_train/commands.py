"""What the command line and `CareTrainer` run: from a configuration to a run's folder."""

import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from care_train.config import Config, config_to_dict, load_config
from care_train.data import Sample, load_samples, require_rationales
from care_train.distributed import barrier, initialize_process_group, is_main
from care_train.evaluation.benchmark_run import (
    benchmark_summary,
    evaluate_benchmarks,
    open_questions,
)
from care_train.evaluation.evaluate import evaluate_both
from care_train.models.tiny import model_folder
from care_train.publishing import Summary, before_and_after, claim, finish, run_facts
from care_train.reporting import MetricsLogger, read_metrics
from care_train.reporting.archive import ArchiveWriter
from care_train.rollout.engine import RolloutEngine
from care_train.training.archiving import open_writer
from care_train.training.checkpoint import Checkpoint, seed_all
from care_train.training.folders import clean_up
from care_train.training.guard import guarded
from care_train.training.resume import (
    check_progress,
    check_settings,
    cold_start_logs,
    cut_logs,
    settings_of,
)
from care_train.training.rl import RlLoop, check_ranks, open_checkpoints
from care_train.training.run_folder import CONFIG_FILE, RunFolder, open_run, run_dir_of
from care_train.training.session import Given, Session, open_session, usable_rows
from care_train.training.sft import cold_start_checkpoints, cold_start_rows, count_rows, run_sft
from care_train.training.weights import drop_weights


def run_command(
    command: str, config: Config, files: Mapping[str, Path], given: Given | None = None
) -> Summary:
    """Run `quickstart`, `sft`, `train` or `eval`, in a folder of its own; its summary.

    Args:
        command: which.
        config: the run's settings.
        files: those the settings were read from, by what named them.
        given: what a program hands over.

    Raises:
        Stopped: a signal asked for it; a checkpoint is saved.
        ValueError: a setting, a row or a file that cannot be used.
        RunError: the run cannot go on (docs/failures.md).
    """
    given, start = given or Given(), time.perf_counter()
    work = {
        "quickstart": partial(train, cold_start="cold_start"),
        "sft": sft,
        "train": train,
        "eval": evaluate,
    }[command]
    with (
        guarded(config.limits, run_dir_of(config), in_program=given.in_program),
        open_run(config, files) as run,
    ):
        claim(config)
        device = initialize_process_group()
        seed_all(config.seed)
        summary = work(config, run, given, device)
        return finish(run.path, config, run_facts(config, given) | summary, start)


def _checkpoint(config: Config, run: RunFolder, cold_start: str) -> Checkpoint | None:
    """What a run that is resumed goes on from, its logs cut to it; None starts at step 0, so that a
    job script may always say `--resume`.

    `cold_start` is the folder that ends a cold start, where the run has one: while it is not there,
    the checkpoint is the cold start's.
    """
    if not run.is_resumed:
        return None
    folder = run.path
    if is_main():
        clean_up(folder)
    barrier()
    in_cold_start = bool(cold_start) and not (folder / cold_start).is_dir()
    checkpoints = (cold_start_checkpoints if in_cold_start else open_checkpoints)(config, folder)
    if not in_cold_start:
        cold_start_checkpoints(config, folder).remove()
    checkpoints.clean_up()
    checkpoint = checkpoints.newest()
    free = () if cold_start else ("sft",)
    if checkpoint is None:
        where = folder / CONFIG_FILE
        check_settings(settings_of(load_config(where)), config, where=where, free=free)
        cut_logs(folder, cold_start_logs(folder, cold_start or None), -1)
    else:
        settings, where = checkpoint.state["settings"], checkpoint.folder
        check_settings(settings, config, where=where, free=free)
        section = "sft" if in_cold_start else "train"
        check_progress(checkpoint, f"{section}.steps", getattr(config, section).steps)
        cut_logs(folder, checkpoint.state["logs"], -1 if in_cold_start else checkpoint.step)
    if is_main():
        start = "step 0: no checkpoint yet" if checkpoint is None else str(checkpoint.folder)
        print(f"resuming {folder} from {start}", file=sys.stderr)
        if {*config.logging.report_to} - {"tensorboard"}:
            print("trackers show steps after it a second time", file=sys.stderr)
    return checkpoint


def sft(config: Config, run: RunFolder, given: Given, device: torch.device) -> Summary:
    """`care-train sft`: cold start; the model goes to `final/`."""
    checkpoint = _checkpoint(config, run, "final")
    samples = load_samples(config.sft.data, config.seed, "sft.data", given.rows)
    if run.is_resumed and (run.path / "final").is_dir():
        # It had ended: all that a kill can have cut short is the report.
        values = read_metrics(run.begin({}) / "metrics.jsonl")[-1]
        values |= count_rows(samples, require_rationales(samples))
    else:
        base = model_folder(config, run.path / "base", samples)
        session = open_session(config, base, device, given)
        rows = cold_start_rows(session, samples, run.path)
        run_dir = run.begin({"sft.data": samples})
        with _metrics(run_dir, session) as metrics:
            values = run_sft(
                session, rows, run_dir / "final", metrics, device, checkpoint, run.started
            )
    kept = ("loss", "eval_loss", "rows", "rows_without_rationale")
    return {key: values[key] for key in kept if key in values} | {"steps": config.sft.steps}


def train(
    config: Config, run: RunFolder, given: Given, device: torch.device, cold_start: str = ""
) -> Summary:
    """Reinforcement learning, evaluated before and after: `care-train train` of `model.path`,
    `care-train quickstart` of what a short cold start makes of it in the folder `cold_start`."""
    if not cold_start and config.train.eval_every and config.held_out is None:
        raise ValueError("train.eval_every: wanted 0 without eval.data: no rows to evaluate on")
    check_ranks(config)
    checkpoint = _checkpoint(config, run, cold_start)
    begins_cold = bool(cold_start) and not (run.is_resumed and (run.path / cold_start).is_dir())
    cold_samples: Sequence[Sample] = ()
    if cold_start:
        cold_samples = load_samples(config.sft.data, config.seed, "sft.data", given.rows)
    samples = load_samples(config.data, config.seed, given=given.rows)
    held_out = load_held_out(config, given)
    base = model_folder(config, run.path / "base", chain(cold_samples, samples))
    first = run.path / cold_start if cold_start and not begins_cold else base
    session = open_session(config, first, device, given)
    samples, _ = usable_rows(session, samples, "data", run.path)
    usable_rows(session, held_out, "eval.data")
    rows = cold_start_rows(session, cold_samples, run.path) if begins_cold else None
    read = {"sft.data": cold_samples} if cold_start else {}
    run_dir = run.begin(read | {"data": samples, "eval.data": held_out})
    with _metrics(run_dir, session) as metrics, open_writer(config, run_dir) as archive:
        if rows is not None:
            start = run_dir / cold_start
            run_sft(session, rows, start, metrics, device, checkpoint, run.started)
            session, checkpoint = open_session(config, start, device, given), None
        return _train_from(session, run, samples, held_out, metrics, archive, device, checkpoint)


def evaluate(config: Config, run: RunFolder, given: Given, device: torch.device) -> Summary:
    """`care-train eval`: `model.path` on `eval.benchmarks`, or on `eval.data`."""
    if not config.eval.benchmarks and config.resume:
        raise ValueError("resume: got true, but `eval without eval.benchmarks` starts anew")
    is_data_read = not config.eval.benchmarks or "data" in config.eval.benchmarks
    if is_data_read and config.held_out is None:
        raise ValueError("eval.data: got none, wanted the rows to evaluate on: set it")
    held_out = load_held_out(config, given) if is_data_read else []
    session = open_session(config, model_folder(config, run.path / "base", held_out), device, given)
    if config.eval.benchmarks:
        # All rows are read before the first answer: a wrong file must not stop the last benchmark.
        names = dict.fromkeys(config.eval.benchmarks)
        question_sets = [open_questions(name, config) for name in names]
        run_dir = run.begin({"eval.data": held_out})
        return benchmark_summary(
            evaluate_benchmarks(session, question_sets, run_dir, device, run.started)
        )
    usable_rows(session, held_out, "eval.data")
    run_dir = run.begin({"eval.data": held_out})
    engine = session.rollout_engine()
    run.started()
    with open_writer(config, run_dir) as archive:
        return evaluate_both(session, engine, held_out, device, archive=archive)


def load_held_out(config: Config, given: Given) -> Sequence[Sample]:
    """The held-out rows; none without `eval.data`."""
    if config.held_out is None:
        return []
    return load_samples(config.held_out, config.seed, "eval.data", given.rows)


def _train_from(
    session: Session,
    run: RunFolder,
    samples: Sequence[Sample],
    held_out: Sequence[Sample],
    metrics: MetricsLogger,
    archive: ArchiveWriter | None,
    device: torch.device,
    checkpoint: Checkpoint | None,
) -> Summary:
    config, run_dir, given = session.config, run.path, session.given
    first_step = 0 if checkpoint is None else checkpoint.step
    given.callbacks.begin(config, config.train.steps, first_step, session.loaded.model)
    before = _logged_before(config, run_dir, checkpoint)
    if before is None and held_out:
        before = _evaluate_session(session, held_out, device, archive, "evaluate before", 0)
        metrics.log(0, before, phase="eval")

    def evaluate_now(engine: RolloutEngine, step: int) -> dict[str, float]:
        return evaluate_both(session, engine, held_out, device, archive=archive, step=step)

    evaluation = evaluate_now if held_out else None
    # No name for the loop: its reference and rollout engine must be gone before the evaluation.
    totals = RlLoop(session, samples, run_dir, metrics, device, evaluation, archive).train(
        run_dir / "final", checkpoint, run.started
    )
    facts: Summary = {key: int(value) for key, value in totals.items()}
    if facts["steps"] < config.train.steps:
        asked = given.callbacks.control.should_training_stop
        facts["ended_early"] = "a callback asked" if asked else "nearly all responses were right"
    if before is not None:
        # A card may hold no two models and vLLM.
        drop_weights(session.loaded.model)
        trained, steps = open_session(config, run_dir / "final", device, given), facts["steps"]
        given.callbacks.show(trained.loaded.model)
        after = _evaluate_session(trained, held_out, device, archive, "evaluate after", steps)
        metrics.log(steps, after, phase="eval")
        open_checkpoints(config, run_dir).mark_best(steps, after)
        facts |= before_and_after(before, after)
    given.callbacks.end()
    return facts


def _logged_before(
    config: Config, run_dir: Path, checkpoint: Checkpoint | None
) -> dict[str, float] | None:
    """The evaluation before training that a resumed run finds in its log; None to repeat it."""
    if checkpoint is None:
        return None
    now, saved = settings_of(config), checkpoint.state["settings"]
    if any(saved.get(key) != value for key, value in now.items() if key.startswith("eval.")):
        return None
    for record in read_metrics(run_dir / "metrics.jsonl"):
        if (record["phase"], record["step"]) == ("eval", 0):
            return {k: v for k, v in record.items() if k not in ("phase", "step", "time")}
    return None


def _evaluate_session(
    session: Session,
    held_out: Sequence[Sample],
    device: torch.device,
    archive: ArchiveWriter | None,
    description: str,
    step: int,
) -> dict[str, float]:
    engine = session.rollout_engine()
    values = evaluate_both(
        session, engine, held_out, device, description, archive=archive, step=step
    )
    engine.rest()  # before training, its memory is the optimiser's, which is made next
    return values


def _metrics(run_dir: Path, session: Session) -> MetricsLogger:
    config = session.config
    logger = MetricsLogger(run_dir, config.logging, config_to_dict(config), enabled=is_main())
    logger.observers.append(session.given.callbacks.observe)
    return logger
