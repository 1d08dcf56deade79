"""A rank of `CareTrainer` under a launcher: `python -m tests.trainer_ranks FOLDER MODEL`."""

import sys
from pathlib import Path

from care_train import CareTrainer
from tests.test_trainer import SMALL, Record, color_rows, named

if __name__ == "__main__":
    folder, model = Path(sys.argv[1]), sys.argv[2]
    record = Record(stop_after=1)
    trainer = CareTrainer(
        model=model,
        reward_funcs=named,
        config={"name": "run", "output_dir": str(folder), **SMALL},
        train_dataset=color_rows(),
        callbacks=[record],
    )
    summary = trainer.train()
    assert summary["steps"] == 1, summary
    assert record.events == [("begin", 0), ("step", 1), ("save", 1), ("end", 1)], record.events
    trainer.save_model(folder / "mine")
    assert (folder / "mine" / "model.safetensors").is_file()
