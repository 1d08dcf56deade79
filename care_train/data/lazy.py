"""Samples that are read from their file when asked for, so that memory does not grow with them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from care_train.data.image_refs import ImageRef
from care_train.data.schema import Sample, sample_digest


@dataclass(frozen=True)
class LazySamples(Sequence[Sample]):
    """A sequence whose every access reads the row anew: keep what is used twice.

    Slices are lazy too.
    """

    read: Callable[[int], Sample]
    """The sample at a place of the file."""
    places: Sequence[int]
    """Which places of the file, in order."""
    stored_digests: Callable[[], Sequence[str]] | None = None
    """The checksum of each place, where the file holds them; `read` then checks them."""

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "LazySamples": ...
    def __getitem__(self, index: int | slice) -> "Sample | LazySamples":
        if isinstance(index, slice):
            return LazySamples(self.read, self.places[index], self.stored_digests)
        return self.read(self.places[index])

    def where(self, holds: Callable[[Sample], bool]) -> "LazySamples":
        """Those that `holds` is true of; reads each once."""
        kept = [place for place in self.places if holds(self.read(place))]
        return LazySamples(self.read, kept, self.stored_digests)

    def at(self, indices: Sequence[int]) -> "LazySamples":
        """Those at these indices; reads none."""
        return LazySamples(self.read, [self.places[i] for i in indices], self.stored_digests)

    def digests(self) -> Iterator[str]:
        """Each row's checksum, in order: the file's own where it has them."""
        if self.stored_digests is not None:
            stored = self.stored_digests()
            yield from (stored[place] for place in self.places)
        else:
            yield from _digests(self)


def sample_digests(samples: Iterable[Sample]) -> Iterator[str]:
    """Each row's checksum, images included; `sample_digest` says of what.

    Raises:
        ValueError: a missing image file, naming the row.
    """
    return samples.digests() if isinstance(samples, LazySamples) else _digests(samples)


def samples_where(samples: Sequence[Sample], holds: Callable[[Sample], bool]) -> Sequence[Sample]:
    """The samples that `holds` is true of, lazy where `samples` are."""
    if isinstance(samples, LazySamples):
        return samples.where(holds)
    return [sample for sample in samples if holds(sample)]


def samples_at(samples: Sequence[Sample], indices: Sequence[int]) -> Sequence[Sample]:
    """The samples at these indices, lazy where `samples` are."""
    if isinstance(samples, LazySamples):
        return samples.at(indices)
    return [samples[index] for index in indices]


def _digests(samples: Iterable[Sample]) -> Iterator[str]:
    files: dict[ImageRef, str] = {}
    return (sample_digest(sample, files) for sample in samples)
