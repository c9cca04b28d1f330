"""``ConfigFile``: a class whose configuration is a JSON file in a folder or a repository on the Hub."""

from pathlib import Path
from typing import Any, ClassVar

from minidiff.checkpoints.arguments import refuse_unless_harmless
from minidiff.checkpoints.hub import Repo
from minidiff.config import read_json


class ConfigFile:
    """Base of networks, schedulers and whatever else has such a file."""

    config_name: ClassVar[str | None] = None  # the name of the file

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | Path,
        return_unused_kwargs: bool = False,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        **unused: Any,
    ) -> dict[str, Any] | tuple[dict[str, Any], dict[str, Any]]:
        """Read the file ``config_name`` of a folder or a Hub repository, or the file that the path is, as a dict.

        Raises CheckpointNotFoundError if there is none, TypeError for unknown arguments that are not asked back with
        ``return_unused_kwargs``.
        """
        if cls.config_name is None:
            raise ValueError(f"{cls.__name__} has no config_name: call load_config on a class that has one")
        if not return_unused_kwargs and (unknown := refuse_unless_harmless(unused)):
            raise TypeError(f"{cls.__name__}.load_config got unknown arguments {', '.join(unknown)}")
        path = Path(pretrained_model_name_or_path)
        if not path.is_file():
            where = (subfolder, revision, cache_dir, bool(local_files_only), token, force_download)
            path = Repo(pretrained_model_name_or_path, *where).file(cls.config_name)
        return (read_json(path), unused) if return_unused_kwargs else read_json(path)
