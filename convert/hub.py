"""Checkpoints by their name on huggingface.co: the files that are needed, of one revision, kept in the hub's cache."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mllama_jax.errors import InputError

NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "LICENSE*", "USE_POLICY.md")


def local(source: str | os.PathLike[str], revision: str | None = None) -> str | os.PathLike[str]:
    """`source` itself if it is a directory; where it is a name such as `meta-llama/Llama-3.2-11B-Vision`, its download.

    What an earlier download left is used; one that was cut off goes on.

    Raises:
        InputError: the name is unknown, its licence not accepted, or the hub out of reach.
    """
    if Path(source).exists() or not isinstance(source, str) or not NAME.fullmatch(source):
        if revision is not None:
            raise InputError(f"{source}: revision {revision!r} is for names on huggingface.co; leave it out")
        return source
    from huggingface_hub import errors, snapshot_download

    page = f"https://huggingface.co/{source}"
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(_FILES), ignore_patterns="*/*"))
    except errors.GatedRepoError:
        fault = f"is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        fault = f"has no revision {revision!r}; see {page}/commits/main"
    except errors.RepositoryNotFoundError:
        fault = "is no directory here and no model that huggingface.co shows you; check the name, or log in"
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error.__cause__ or error).split())[:150]
        fault = f"cannot be downloaded ({reason}); connect and try again, or give a directory"
    raise InputError(f"{source}: {fault}")
