"""The files that statistics are written to: the document, a figure, a page. Checked before a run, written after it."""

import json
from dataclasses import dataclass
from pathlib import Path

from capmerge.document import Document
from capmerge.errors import UsageError, printable
from capmerge.output import check_target, write_whole
from capmerge.report import table
