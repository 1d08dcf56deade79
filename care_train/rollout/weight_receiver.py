"""In the workers of a `care-train serve`: weights in, each bucket by one broadcast, and checked.

vLLM mixes this class into its worker (`worker_extension_cls`) and imports it in every worker
process before the model is made.
"""

from collections.abc import Sequence

import torch

from care_train.rollout.adapter_sync import is_adapter, load_adapter
from care_train.rollout.checksum import checksum
from care_train.rollout.vllm_cpu import patch_cpu_backend
from care_train.rollout.weight_channel import Broadcast, NcclMeeting, TcpMeeting, join
from care_train.rollout.weight_sync import SentTensor, find_failures, load_tensor

if not torch.cuda.is_available():
    patch_cpu_backend()

TensorNote = tuple[str, str, Sequence[int], int]
"""What a bucket says of a tensor: its name, dtype, shape and checksum."""


class WeightReceiver:
    """The worker's side of a weight sync: `care_open` once, then begin, receive..., end."""

    device: torch.device
    _care_broadcast: Broadcast | None = None
    _care_placed: dict[str, list[SentTensor]]
    _care_adapter: dict[str, torch.Tensor]
    _care_has_base = False

    def care_open(self, meeting: TcpMeeting | NcclMeeting) -> None:
        """Join the trainer's group."""
        from vllm.distributed import get_tp_group  # pyright: ignore[reportMissingImports]

        group = get_tp_group()
        rank, size = 1 + group.rank_in_group, 1 + group.world_size
        self._care_broadcast, self._care_has_base = None, False
        self._care_broadcast = join(meeting, rank, size)

    def care_begin(self) -> None:
        """Forget what was sent before."""
        self._care_placed, self._care_adapter = {}, {}

    def care_receive(self, notes: Sequence[TensorNote], num_bytes: int) -> str | None:
        """Take one bucket and load its tensors; says what could not be loaded.

        Args:
            notes: the tensors, in the order in which they lie in the bucket, none aligned.
            num_bytes: size of the bucket.
        """
        broadcast, self._care_broadcast = self._care_broadcast, None
        if broadcast is None:
            return "the server's workers have not met the trainer"
        bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        broadcast(bucket)
        # What failed in its middle is of no more use.
        self._care_broadcast = broadcast
        start = 0
        for name, dtype_name, shape, total in notes:
            dtype = getattr(torch, dtype_name)
            end = start + torch.Size(shape).numel() * dtype.itemsize
            # A copy: the pieces of a bucket need not start where their dtype may.
            tensor = bucket[start:end].clone().view(dtype).reshape(shape)
            start = end
            problem = self._care_load(SentTensor(name, tuple(shape), total), tensor)
            if problem is not None:
                return problem
        return None

    def care_failures(self) -> list[str]:
        """What is wrong with the model after all buckets."""
        if self._care_placed or not self._care_has_base:
            self._care_has_base = False
            if failures := find_failures(self, self._care_placed):
                return failures
            self._care_has_base = True
        return load_adapter(self, self._care_adapter) if self._care_adapter else []

    def _care_load(self, sent: SentTensor, tensor: torch.Tensor) -> str | None:
        if is_adapter(sent.name):
            self._care_adapter[sent.name] = tensor
            return None if checksum(tensor) == sent.checksum else f"{sent.name!r}: arrived changed"
        try:
            filled = load_tensor(self, sent.name, tensor)
        # What vLLM's loaders raise on unknown names and wrong shapes.
        except (ValueError, KeyError, AttributeError, AssertionError, RuntimeError) as error:
            return f"{sent.name!r} {sent.shape}: vLLM could not load it: {error}"
        if not filled:
            return f"{sent.name!r}: vLLM has no parameter of this name"
        for parameter in filled:
            self._care_placed.setdefault(parameter, []).append(sent)
        return None
