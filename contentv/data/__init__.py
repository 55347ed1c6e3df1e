"""Datasets on disk: writing shards, checking them, and reading them back in an exact, resumable order."""

from contentv.data.config import DataConfig
from contentv.data.dataset import DatasetInfo, ShardInfo, TextInfo, VaeInfo
from contentv.data.inspection import read_metas, verify_dataset
from contentv.data.joined import JoinedDatasets
from contentv.data.loader import open_dataset
from contentv.data.quality import Normaliser
from contentv.data.source import DatasetSource
from contentv.data.storage import is_url
from contentv.data.writer import DatasetWriter, ShardSetWriter, refit_quality

__all__ = [
    "DataConfig",
    "DatasetInfo",
    "DatasetSource",
    "DatasetWriter",
    "JoinedDatasets",
    "Normaliser",
    "ShardInfo",
    "ShardSetWriter",
    "TextInfo",
    "VaeInfo",
    "is_url",
    "open_dataset",
    "read_metas",
    "refit_quality",
    "verify_dataset",
]
