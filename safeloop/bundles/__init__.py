"""Replay bundles: a turn that failed, on disk, to be run again on another machine. Safetensors and JSON, no pickle."""

from safeloop.bundles.bundle import Bundle
from safeloop.bundles.read import read_bundle
from safeloop.bundles.write import saver, text_of, write_bundle

__all__ = ["Bundle", "read_bundle", "saver", "text_of", "write_bundle"]
