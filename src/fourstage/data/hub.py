"""Sets on the Hugging Face hub: what a path names, and the rows of one split.

Name, commit and split identify rows without a download; a set without a commit is taken at its
latest one, which is one request. Files are fetched one by one, when their rows are read, into the
hub client's cache (HF_HOME), where a second run finds them without a request. A mirror (data.root)
is read in place.
"""

import hashlib
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import ENOSPC
from functools import lru_cache
from json import JSONDecodeError
from pathlib import Path

from fourstage.data.files import Paths, Row, iter_rows
from fourstage.data.known_sets import KNOWN
from fourstage.errors import UserError
from fourstage.files import expanded

PREFIX = "hf:"
NAMED = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@(.+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
CARDS = ["README.md", ".huggingface.yaml", "dataset_infos.json"]  # name the subsets' files
EVERYWHERE = ".gitattributes"  # a small file of every set


@dataclass(frozen=True)
class HubSplit:
    """One split of a set. At a commit (see `pinned`) that identifies its rows."""

    repo: str
    revision: str | None  # None: the latest
    subsets: tuple[str, ...]  # none: the set's only one, or its default
    split: str

    @property
    def name(self) -> str:
        return f"{PREFIX}{self.repo}"


def on_hub(path: Paths | None) -> bool:
    """Whether a path names a set on the hub. Raises UserError for one in a list of files."""
    if isinstance(path, list) and any(str(one).startswith(PREFIX) for one in path):
        raise UserError("path: name one set on the hub alone, not in a list of files")
    return isinstance(path, str) and path.startswith(PREFIX)


def splits(
    path: str, revision: str | None, subset: Paths | None, train: str | None, held: str | None
) -> tuple[HubSplit, HubSplit | None]:
    """The train and the held-out split that a source's settings name; None is what is known of the
    set, or its "train", and no held-out split. Raises UserError, without a request."""
    found = NAMED.fullmatch(path)
    if found is None:
        raise UserError(f"path: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, got {path!r}")
    repo, short = found.groups()
    if short is not None and revision is not None:
        raise UserError(f"revision: {path} names one already: leave one of them out")
    known = KNOWN.get(repo)
    commit = short or revision or (known.revision if known else None)
    subsets = (subset,) if isinstance(subset, str) else tuple(subset or ())
    if known:
        subsets, train = subsets or known.subsets, train or known.split
        held = held or known.heldout_split
    train = train or "train"
    if train == held:
        raise UserError(f"split: {train!r} is the held-out split too: set heldout_split=OTHER")
    return tuple(  # type: ignore[return-value]
        HubSplit(repo, commit, subsets, name) if name else None for name in (train, held)
    )


@lru_cache
def pinned(wanted: HubSplit, root: str | None) -> HubSplit:
    """The split at a commit; says which, if it is the latest. A mirror that doesn't tell its commit
    is known by its content. Raises UserError if the hub can't be asked."""
    if wanted.revision is not None and COMMIT.fullmatch(wanted.revision):
        return wanted
    if root is not None:
        return replace(wanted, revision=_commit_of(_mirror(root, wanted)))
    from huggingface_hub import dataset_info

    with _explained(wanted):
        commit = dataset_info(wanted.repo, revision=wanted.revision, timeout=30).sha
    at = wanted.revision or "no commit is pinned: the latest"
    print(f"{wanted.name}: {at} is {commit}; {wanted.name}@{commit} keeps it", file=sys.stderr)
    return replace(wanted, revision=commit)


def _commit_of(mirror: Path) -> str:
    """The commit that the hub's client notes beside what it downloads, else a digest."""
    files = _inside(mirror)
    noted = [path for path in files if path.suffix == ".metadata"]
    if noted:
        return noted[0].read_text().split("\n")[0]
    digest = hashlib.sha1()
    for path in files:
        digest.update(f"{path.relative_to(mirror)}\n".encode())
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha1").digest())
    return digest.hexdigest()


def _inside(mirror: Path) -> list[Path]:
    """The files of a mirror, in order, also those in linked folders."""
    walked = os.walk(mirror, followlinks=True)
    paths = (Path(folder, name) for folder, _, names in walked for name in names)
    of_git = mirror / ".git"
    return sorted(p for p in paths if p.is_file() and of_git not in p.parents)


def _how_to_find(repo: str) -> str:
    return (
        f"take one from `git ls-remote https://huggingface.co/datasets/{repo} main` and write "
        f"{PREFIX}{repo}@COMMIT"
    )


def hub_rows(
    wanted: HubSplit, columns: Mapping[str, str] | None, root: str | None
) -> Iterator[Row]:
    """The rows of a split in our schema, fetched as far as they are read.

    columns: {name in our schema: name in the set}; None is what is known of the set. root: the
    folder of mirrors, data.root. Raises UserError, one line that says what to do, for whatever
    keeps the rows away.
    """
    _quieten()
    wanted = pinned(wanted, root)
    mirror = None if root is None else _mirror(root, wanted)
    known = None if columns else KNOWN.get(wanted.repo)
    files = _files(wanted, mirror)

    def rows() -> Iterator[Row]:
        for name in files:
            path = _fetched(wanted, name) if mirror is None else _mirrored(wanted, name, mirror)
            label = f"{wanted.name} {name}"
            try:
                for row in iter_rows(str(path), known.columns if known else columns):
                    kept = known.columns if known else row.values
                    values = {field: row.values[field] for field in kept}
                    yield Row(values, row.where.replace(str(path), label))
            except UserError as error:
                raise UserError(str(error).replace(str(path), label)) from None

    return known.adapt(rows()) if known and known.adapt else rows()


def _quieten() -> None:
    """Bars in a terminal only, and nothing about a card without metadata, which is fine."""
    from datasets.utils.logging import disable_progress_bar
    from huggingface_hub.utils import disable_progress_bars

    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bar()
        disable_progress_bars()


def _files(wanted: HubSplit, mirror: Path | None) -> list[str]:
    """The names of a split's files, in order, as `datasets` finds them: by the set's card, or else
    by the files' own names. It looks at a folder of empty files, which needs no download."""
    names, cards = _listing(wanted, mirror)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (path := Path(folder, name)).parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        for name, card in cards.items():
            shutil.copyfile(card, Path(folder, name))
        subsets = wanted.subsets or (None,)
        return [file for subset in subsets for file in _named(wanted, subset, folder)]


def _named(wanted: HubSplit, subset: str | None, folder: str) -> list[str]:
    import datasets

    try:
        subsets = datasets.get_dataset_config_names(folder)
        alone = subsets[0] if len(subsets) == 1 else "default"
        named = alone if subset is None else subset
        found: Mapping[str, list[str]] | None = None
        if named in subsets:
            cache = f"{folder}/.cache"
            builder = datasets.load_dataset_builder(folder, name=named, cache_dir=cache)
            found = {str(split): files for split, files in builder.config.data_files.items()}
    except Exception as error:  # of its own, or of YAML, zip files ...
        reason = _first(error).replace(folder, "it")
        raise UserError(
            f"{wanted.name}: `datasets` can't tell its data files ({reason}): use another set, or "
            "download its files and name them under data=files"
        ) from None
    if found is None:
        lacks = "it has several subsets" if subset is None else f"no subset {subset!r}"
        raise UserError(f"{wanted.name}: {lacks}: give subset=NAME, one of {', '.join(subsets)}")
    if wanted.split not in found:
        raise UserError(
            f"{wanted.name}: no split {wanted.split!r}: give split=NAME (held out: "
            f"heldout_split=NAME), one of {', '.join(found)}"
        )
    base = Path(folder).resolve()
    return [Path(file).resolve().relative_to(base).as_posix() for file in found[wanted.split]]


def _listing(wanted: HubSplit, mirror: Path | None) -> tuple[list[str], dict[str, Path]]:
    """The names of all files at the commit, and where the cards among them are."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    which = {"repo_id": wanted.repo, "repo_type": "dataset", "revision": wanted.revision}
    if mirror is not None:
        there = [path.relative_to(mirror).as_posix() for path in _inside(mirror)]
        try:  # a part may have been downloaded
            names = [file.path for file in get_cached_repo_tree(**which, local_dir=mirror)]
        except CachedRepoTreeNotFoundError:
            names = [name for name in there if not name.startswith(".cache/")]
        return names, {name: mirror / name for name in CARDS if name in there}
    with _explained(wanted):
        try:
            files = get_cached_repo_tree(**which)
        except CachedRepoTreeNotFoundError:
            snapshot_download(**which, allow_patterns=EVERYWHERE)  # keeps the listing
            files = get_cached_repo_tree(**which)
        names = [file.path for file in files]
        return names, {name: _fetched(wanted, name) for name in CARDS if name in names}


def _fetched(wanted: HubSplit, name: str) -> Path:
    """A file in the cache of the hub client, downloaded if it isn't there."""
    from huggingface_hub import hf_hub_download

    with _explained(wanted):
        what = {"repo_id": wanted.repo, "filename": name, "repo_type": "dataset"}
        plan = hf_hub_download(**what, revision=wanted.revision, dry_run=True)
        if not plan.is_cached:
            _check_room(wanted, name, plan.file_size or 0)
        return Path(hf_hub_download(**what, revision=wanted.revision))


def _check_room(wanted: HubSplit, name: str, size: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if size > (free := shutil.disk_usage(there).free):
        raise UserError(
            f"{wanted.name}: {name} has {size / 1e9:,.1f} GB, and {there} has {free / 1e9:,.1f} GB "
            "free: make room, or set HF_HOME to a folder on another disk"
        )


def _mirror(root: str, wanted: HubSplit) -> Path:
    folder = expanded(root) / wanted.repo
    if not folder.is_dir():
        raise UserError(f"data.root: {folder} is not there: {_how_to_mirror(wanted, str(folder))}")
    return folder


def _mirrored(wanted: HubSplit, name: str, mirror: Path) -> Path:
    """A file of a mirror. Raises UserError if it is missing, or known to be of another commit."""
    path = mirror / name
    if not path.is_file():
        raise UserError(f"data.root: {path} is not there: {_how_to_mirror(wanted, str(mirror))}")
    note = mirror / ".cache" / "huggingface" / "download" / f"{name}.metadata"
    if note.is_file() and (commit := note.read_text().split("\n")[0]) != wanted.revision:
        raise UserError(
            f"data.root: {path} is of commit {commit}, not {wanted.revision}: "
            f"{_how_to_mirror(wanted, str(mirror))}"
        )
    return path


def _how_to_mirror(wanted: HubSplit, folder: str) -> str:
    at = f" --revision {wanted.revision}" if wanted.revision else ""
    return f"hf download {wanted.repo} --repo-type dataset{at} --local-dir {folder}"


@contextmanager
def _explained(wanted: HubSplit) -> Iterator[None]:
    """Makes one line of whatever goes wrong between here and the hub."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/datasets/{wanted.repo}"
    mirror = _how_to_mirror(wanted, f"FOLDER/{wanted.repo}")
    elsewhere = f"get it elsewhere with `{mirror}` and set data.root=FOLDER"
    try:
        yield
    except errors.GatedRepoError:
        said = f"it is gated: accept its terms at {page} and log in (hf auth login, or HF_TOKEN)"
    except errors.RepositoryNotFoundError:
        said = f"no such set at {page}: check the name; if it is private, log in (hf auth login)"
    except errors.RevisionNotFoundError:
        is_commit = COMMIT.fullmatch(wanted.revision or "")
        what = "commit {} is gone" if is_commit else "it has no revision {}"
        said = f"{what.format(wanted.revision)}: {_how_to_find(wanted.repo)}"
    except errors.OfflineModeIsEnabled:
        other = f"name the commit ({wanted.name}@COMMIT), or {elsewhere}"
        said = f"HF_HUB_OFFLINE is set: unset it, {other}"
    except errors.LocalEntryNotFoundError as error:
        if constants.is_offline_mode():
            said = f"not in the cache, and HF_HUB_OFFLINE is set: unset it, or {elsewhere}"
        else:
            why = _first(error.__cause__ or error)
            said = f"{constants.ENDPOINT} can't be reached ({why}): try again, or {elsewhere}"
    except errors.HFValidationError as error:
        said = f"the hub has no such names ({_first(error)})"
    except JSONDecodeError:  # the page of a proxy, say
        said = f"what {constants.ENDPOINT} answers is not a hub's: check HF_ENDPOINT and the proxy"
    except (errors.HfHubHTTPError, errors.HTTPError) as error:
        said = f"{constants.ENDPOINT} failed ({_first(error)}): try again, or {elsewhere}"
    except OSError as error:
        if error.errno == ENOSPC:
            said = f"the disk of {constants.HF_HUB_CACHE} is full: make room, or set HF_HOME"
        else:
            said = f"the download failed ({_first(error)}): try again"
    else:
        return
    raise UserError(f"{wanted.name}: {said}")


def _first(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
