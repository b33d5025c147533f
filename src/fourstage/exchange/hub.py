"""Where the checkpoint lies that `hf:FOLDER` or `hf:OWNER/NAME[@REVISION]` names."""

import re
from json import JSONDecodeError
from pathlib import Path

from fourstage.errors import UserError
from fourstage.exchange.architectures import model_config
from fourstage.exchange.checkpoint import INDEX, TOKENIZER_FILES, read_config
from fourstage.files import exists, expanded

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def find_checkpoint(named: str, where: str) -> tuple[Path, str]:
    """The folder of a checkpoint, downloaded if it has to be, and the model's name.

    `named` is a folder, or OWNER/NAME[@REVISION] on the hub if there is no such folder; `where` is
    the key that names it, for messages. Raises UserError if there is neither.
    """
    if exists(folder := expanded(named)):
        if (folder / "run.json").is_file():
            raise UserError(
                f"{where}: {folder} is a run of fourstage: name it as the parent of a later "
                f"stage, as in stages.sft.parent={folder}"
            )
        if not folder.is_dir():
            raise UserError(f"{where}: {folder} is no folder: name the one that it is in")
        return folder.absolute(), folder.resolve().name
    if (found := NAME.fullmatch(named)) is None:
        raise UserError(f"{where}: there is no folder {named}")
    return download(found["repo"], found["revision"], where), found["repo"].split("/")[1]


def download(repo: str, revision: str | None, where: str) -> Path:
    """The snapshot in the hub's cache; config.json comes first, so that an architecture that does
    not map is known before its weights are downloaded."""
    from huggingface_hub import errors, snapshot_download

    shown = f"hf:{repo}" + f"@{revision}" * bool(revision)
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=["config.json"]))
        model_config(read_config(folder), repo, f"{repo}/config.json")
        wanted = ["config.json", "*.safetensors", INDEX, *TOKENIZER_FILES]
        return Path(snapshot_download(repo, revision=folder.name, allow_patterns=wanted))
    except errors.GatedRepoError:
        why = f"is gated: accept its terms at https://huggingface.co/{repo}, then `hf auth login`"
    except errors.RevisionNotFoundError:
        why = "has no such revision: see its history on the hub"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        why = (
            "is neither a folder here nor a model on the hub (a private one needs `hf auth login`)"
        )
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = (
            "is no folder here, not in the hub's cache, and the hub can't be reached: download it "
            f"elsewhere (hf download {repo} --local-dir FOLDER) and name that folder"
        )
    except errors.HTTPError as error:
        why = f"could not be downloaded ({str(error).splitlines()[0]}): try again later"
    except JSONDecodeError:  # the page of a proxy, say
        why = "could not be found: the answer is not a hub's: check HF_ENDPOINT and the proxy"
    except OSError as error:
        why = f"could not be downloaded ({error}): try again later"
    raise UserError(f"{where}: {shown} {why}")
