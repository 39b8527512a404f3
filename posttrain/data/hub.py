"""Data sets of the Hugging Face hub: `hf:owner/name[/folder][@revision][:split]`.

The data set's own files are downloaded as they are; its loading scripts are never run.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

HF_PREFIX = "hf:"
_NAME = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<folder>[\w./-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?"
)


def download(name: str, suffixes: tuple[str, ...]) -> list[str]:
    """Local paths of the split's files, in order.

    Raises ValueError: a name that cannot be read, no hub within reach and nothing downloaded
    before, no such data set, no such split, or files of several folders.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name}: write hf:owner/name[/folder][@revision][:split]")
    repo, folder, revision, split = match.group("repo", "folder", "revision", "split")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        listed = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
        files = choose(listed, suffixes, folder, split or "train", name)
        return [
            hf_hub_download(repo, file, repo_type="dataset", revision=revision) for file in files
        ]
    except HfHubHTTPError as error:
        raise ValueError(f"{name}: the hub refuses: {error}") from error
    except ValueError:
        raise
    except Exception as error:  # the HTTP client under the hub, and its errors, vary by version
        raise ValueError(
            f"{name}: the hub is out of reach ({type(error).__name__}); download the files where "
            "there is a network and name them as path: folder/*.parquet"
        ) from error


def choose(
    listed: list[str], suffixes: tuple[str, ...], folder: str | None, split: str, name: str
) -> list[str]:
    """The files of a split among those of a repository: by file name or by folder."""
    readable = [
        file
        for file in listed
        if file.lower().removesuffix(".gz").endswith(suffixes)
        and (folder is None or PurePosixPath(file).is_relative_to(folder))
    ]
    # train.jsonl, train-00000-of-00002.parquet, data/train_1.parquet, train/0000.parquet
    word = re.compile(rf"(^|[^a-z0-9]){re.escape(split)}($|[^a-z0-9])", re.IGNORECASE)
    chosen = [file for file in readable if word.search(PurePosixPath(file).name)]
    chosen = chosen or [file for file in readable if word.search(file)]
    if not chosen:
        shown = ", ".join(sorted(readable)[:10]) or "none"
        raise ValueError(f"{name}: no files of split {split!r}; files it could read: {shown}")
    folders = sorted({str(PurePosixPath(file).parent) for file in chosen})
    kinds = sorted({PurePosixPath(file.removesuffix(".gz")).suffix for file in chosen})
    if len(folders) > 1 or len(kinds) > 1:
        raise ValueError(
            f"{name}: split {split!r} is in several places ({', '.join(folders + kinds)}): "
            "name the folder, as in hf:owner/name/folder:split"
        )
    return sorted(chosen)
