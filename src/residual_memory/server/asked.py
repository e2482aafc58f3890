"""What clients send, checked by pydantic; the OpenAPI document is made of these."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Number = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[int, Field(ge=0, le=2**63 - 1)] | Annotated[str, Field(min_length=1, max_length=1024)]
Ids = Annotated[list[Id], Field(min_length=1, max_length=100_000)]
Rows = Annotated[list[Id], Field(min_length=1, max_length=1000)]  # of which much is told


class Asked(BaseModel):
    """A request's body: no field but those that are known."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Queries(Asked):
    """What is asked about: keys with the base's predictions, or inputs for the model, or rows of the memory."""

    keys: list[list[Number]] | None = Field(None, description="[q d], from the layer that the memory was built from.")
    predictions: list[list[Number]] | None = Field(
        None, description="[q c], of the base: probabilities at temperature 1, or values."
    )
    inputs: list[Any] | None = Field(None, description="For the served model: arrays, or rows of a table.")
    ids: Rows | None = Field(None, description="Rows of the memory, each asked without itself.")


class Predict(Queries):
    """Corrected predictions."""

    top: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Only so many classes, the likeliest; by default whole predictions."
    )


class Neighbors(Queries):
    """The nearest memories."""

    n_neighbors: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="By default as many as the setting uses."
    )
    without: Annotated[list[Id], Field(max_length=1000)] = Field([], description="Rows that are passed over.")


class Explain(Queries):
    """Which memories corrected each prediction, and by how much."""

    without: Annotated[list[Id], Field(max_length=1000)] = Field(
        [], description="Rows that are passed over this once, as if they were forgotten."
    )
    neighbors: Annotated[int, Field(ge=1, le=1000)] = Field(10, description="How many to list.")
    order: Literal["distance", "share", "answer"] = Field(
        "distance",
        description="Which are listed: the nearest, those with the largest share, or those labelled with the answer.",
    )
    outputs: Annotated[int, Field(ge=1, le=1000)] = Field(5, description="How many classes to list.")


class Add(Asked):
    """Examples for the memory; durable when the answer comes."""

    keys: list[list[Number]] | None = None
    predictions: list[list[Number]] | None = None
    inputs: list[Any] | None = None
    labels: Annotated[list[Any], Field(min_length=1, max_length=100_000)] | None = Field(
        None, description="Class indices or names, or values; texts say themselves what comes next."
    )
    ids: Ids | None = None
    groups: list[Id] | None = None
    owner: str | None = Field(None, max_length=1024)
    tags: list[str] = Field([], max_length=100)
    snippets: list[str] | None = None


class Forget(Asked):
    """Rows to take out of use at once, by id or by what they carry."""

    ids: Ids | None = None
    where: Mapping[Literal["owner", "tag", "group", "label", "expired"], Any] | None = None


class Cards(Asked):
    """Rows to be shown."""

    ids: Rows
