"""Everything about the data that needs no model, checked before one is fetched and loaded."""

from __future__ import annotations

import logging

from hlora.config.comparison import CompareConfig
from hlora.config.data_files import check_files
from hlora.config.run import RunConfig
from hlora.config.sections import GeneralSource
from hlora.data.domain import domain_rows
from hlora.data.general import measured_text
from hlora.data.rows import read_documents

logger = logging.getLogger("hlora")


def check_data(config: RunConfig | CompareConfig) -> None:
    """Read the rows of each task and every local text: their files, columns and cells.

    They are read again later, as lengths and chat templates need the tokenizer. Skipped rows are reported then.

    Raises:
        DataError: Files are missing, or a file has more unusable rows than its limit allows.
    """
    check_files(config)
    general, level = config.general, logger.level
    logger.setLevel(logging.ERROR)
    try:
        for task in config.tasks.values() if isinstance(config, CompareConfig) else [config.domain]:
            domain_rows(task, None, 0)
        sources: list[GeneralSource] = [*general.mixture] or [general]
        for source in sources:
            for path in source.paths if source.source == "files" else ():
                rows = read_documents(path, source.column)
                rows.within(source.max_unusable, "general.max_unusable", "Set general.column. ")
        for path in config.evaluation.texts.values():
            measured_text(path, general.column)
    finally:
        logger.setLevel(level)
