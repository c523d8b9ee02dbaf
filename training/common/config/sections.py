"""What every section of a configuration is made of: no unknown key, so a typing error never trains for a week."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Part of a configuration: no unknown keys, no change after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StageSection(Section):
    """What a stage is set by."""

    # Its name on the command line, and the sections besides its own that its result depends on.
    stage: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()


class Training(StageSection):
    """What every trained stage has."""

    steps: Natural
    # Samples of a step, of all processes together.
    batch: Count
    # Into how many micro-batches each process cuts its share of the batch: less memory for the same batch.
    accumulate: Count = 1
    # The peak; after warm-up a cosine goes down to a fiftieth of it.
    lr: Rate
    # Between two checkpoints, which are written while training goes on; 0 for one after every step.
    save_seconds: Natural = 600
    # Of first weights, order of samples, and all that is drawn.
    seed: Natural
