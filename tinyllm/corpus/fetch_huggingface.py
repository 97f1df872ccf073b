"""Fetch files of a Hugging Face dataset at a pinned revision; HF_TOKEN holds the token, if any."""

import logging
import os
from pathlib import Path

from tinyllm.artifact import file_sha256
from tinyllm.corpus.sources import HuggingfaceSource
from tinyllm.errors import SourceError
from tinyllm.progress import Progress


def fetch_huggingface(source: HuggingfaceSource, directory: Path, progress: Progress) -> list[Path]:
    """Return the files of the dataset in the order of their names; a broken download is continued.

    Raises:
        SourceError: no network, no such dataset, revision or file, no permission, wrong hash.
    """
    import huggingface_hub  # 0.5 s and a network client: only for those who use it
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # silent retries
    files = []
    for name in sorted(source.files):
        progress.say(f"{source.repo}: fetching {name}")
        try:
            path = huggingface_hub.hf_hub_download(
                source.repo,
                name,
                repo_type="dataset",
                revision=source.revision,
                local_dir=directory,
                endpoint=os.environ.get("HF_ENDPOINT"),
            )
        except GatedRepoError:
            raise SourceError(
                f"{source.repo}: needs permission; accept its terms and set HF_TOKEN"
            ) from None
        except RepositoryNotFoundError:
            raise SourceError(
                f"{source.repo}: no such dataset; if it is private, set HF_TOKEN"
            ) from None
        except RevisionNotFoundError:
            raise SourceError(f"{source.repo}: has no revision {source.revision}") from None
        except LocalEntryNotFoundError as error:  # its way to say that the hub did not answer
            detail = _first_line(error.__cause__ or error)
            raise SourceError(
                f"{source.repo}: cannot reach the hub ({detail}); check the network and run again"
            ) from None
        except EntryNotFoundError:
            raise SourceError(f"{source.repo}: has no file {name}") from None
        except HfHubHTTPError as error:
            raise SourceError(f"{source.repo}: {_first_line(error)}") from None
        except OSError as error:
            if error.errno is not None and error.filename is not None:
                raise  # the disk, not the network
            raise SourceError(f"{source.repo}: {_first_line(error)}") from None
        files.append(_checked(Path(path), source.files[name]))
    return files


def _checked(path: Path, sha256: str | None) -> Path:
    """Return the file if its hash is the promised one, else remove it and say so."""
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        path.unlink()
        raise SourceError(f"{path.name}: SHA-256 is {found}, promised was {sha256}")
    return path


def _first_line(error: BaseException) -> str:
    """Return the beginning of a client's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
