"""What the processes of `FastRun` have imported and computed once before they are forked."""

import gc
import tempfile
from pathlib import Path

from care_train.cli import quiet_libraries

quiet_libraries()

# At the first engine with ZeRO DeepSpeed imports it, and with it torch's compiler.
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import torch  # noqa: E402

import care_train.commands  # noqa: E402
import care_train.publishing  # noqa: E402
import care_train.training.guard  # noqa: E402
from care_train.config import ModelSettings  # noqa: E402
from care_train.models.load import load_model  # noqa: E402
from care_train.models.tiny import build_tiny_model  # noqa: E402

# Half of a small run's time; runs that are no fork of this process draw their plots.
care_train.publishing.draw_plots = lambda *_: None
# A pool of threads would not be there after the fork.
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    # What transformers and tokenizers look up at the first model of a kind.
    for kind in ("tiny-qwen2", "tiny-qwen2.5-vl"):
        load_model(ModelSettings(path=str(build_tiny_model(kind, Path(folder, kind)))))
# Else the first collection in each process would copy all of this.
gc.freeze()
