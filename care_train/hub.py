"""Repositories of the Hugging Face Hub as folders of its cache on this disk, and uploads to it.

HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub. Several
ranks may ask for the same files: its locks let one fetch them, and the others wait.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_MODEL_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_WEIGHTS = ("*.safetensors",)
_DESCRIPTION = ("*.json", "*.txt", "*.jinja", "*.model")
"""Configuration, tokenizer and processor; never code, never pickled weights."""


def model_folder(path: str, *, with_weights: bool = True, key: str = "model.path") -> Path:
    """The folder of a model: the one at `path`, or else that of the Hub's `ORG/NAME[@REVISION]`.

    Without `with_weights` configuration, tokenizer and processor alone are fetched; `key` is the
    setting that errors name.
    """
    found = _MODEL_ID.fullmatch(path)
    if Path(path).expanduser().exists() or found is None:
        return Path(path).expanduser()
    patterns = (*_DESCRIPTION, *_WEIGHTS) if with_weights else _DESCRIPTION
    repo, revision = found["repo"], found["revision"]
    # Of files in folders none are needed; some repositories repeat the weights in another form.
    return snapshot(repo, "model", revision, key, patterns, ("*/*", "consolidated*"))


def repository_of(path: str) -> str | None:
    """The repository of a model's id; None: it is none."""
    found = _MODEL_ID.fullmatch(path)
    return None if found is None else found["repo"]


def snapshot(
    repo: str,
    kind: str,
    revision: str | None,
    key: str,
    patterns: Sequence[str],
    without: Sequence[str] = (),
) -> Path:
    """The folder of a repository's files in the cache, which the missing ones are fetched to.

    Args:
        repo: `ORG/NAME`, a `kind` = model | dataset.
        revision: a branch, tag or commit; None: the newest.
        key: the setting that names it, for errors.
        patterns, without: which files, and which of them not.

    Raises:
        ValueError: no such repository or revision, no access to it, or neither a network nor the
            files in the cache: what to do is said.
    """
    from huggingface_hub import snapshot_download

    with explained(repo, key, kind, revision):
        folder = snapshot_download(
            repo,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(without),
        )
    return Path(folder)


@contextmanager
def explained(
    repo: str, key: str, kind: str = "model", revision: str | None = None
) -> Iterator[None]:
    """Turns what huggingface_hub raises into a `ValueError` that says what to do.

    Args:
        repo: `ORG/NAME`, a `kind` = model | dataset, at a `revision`.
        key: the setting that names it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    folder = "datasets/" if kind == "dataset" else ""
    page = f"{constants.ENDPOINT}/{folder}{repo}"
    name = repo if revision is None else f"{repo}@{revision}"
    log_in = "set HF_TOKEN, or log in with `hf auth login`"
    try:
        yield
    except GatedRepoError:
        text = f"the Hub gives no access: accept the terms on {page}, then {log_in}"
    except RepositoryNotFoundError:
        text = f"no path here, and no {kind} on {constants.ENDPOINT} that may be seen: correct the "
        text += f"name; if it is private, {log_in}"
    except RevisionNotFoundError:
        text = f"no such revision, wanted a branch, tag or commit of {page}"
    except (LocalTokenNotFoundError, OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        options = " --repo-type dataset" * (kind == "dataset")
        options += f" --revision {revision}" * (revision is not None)
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _first_line(error)
        text = f"not in the cache {constants.HF_HUB_CACHE} ({why}): where there is a network run "
        text += f"`hf download {repo}{options}` (HF_HOME says where to), or set a folder's path"
    except (HfHubHTTPError, OSError) as error:
        text = f"{page} answered with an error ({_first_line(error)}): try again, or {log_in}"
    else:
        return
    raise ValueError(f"{key}: {name}: {text}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
