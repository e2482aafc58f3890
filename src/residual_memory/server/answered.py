"""What clients are told, as the OpenAPI document describes it; answers themselves are written without these."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

Probabilities = Annotated[list[list[float]], Field(description="[q c]; of a regression, values.")]


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"]
    version: int


class Info(BaseModel):
    """What the memory holds, and how it is used."""

    library: str = Field(description="The version of residual-memory.")
    memory: str | None = Field(description="The name of its directory; null in RAM.")
    rows: int
    forgotten: int = Field(description="Rows that are out of use, but not erased yet.")
    version: int
    writable: bool
    dim: int
    n_outputs: int
    task: Literal["classification", "regression"]
    metric: str
    class_names: list[str] | None
    id_kind: str | None
    setting: dict[str, Any]
    max_weight: float = Field(description="What one row may contribute at most.")
    index: str
    inputs: dict[str, Any] | None = Field(description="What the served model takes; null without one.")
    surveyed: bool
    pictures: bool


class Output(BaseModel):
    """A class, or a target of a regression."""

    output: int
    name: str
    base: float
    corrected: float


class Neighbor(BaseModel):
    """A row of the memory, near a query."""

    id: int | str
    label: int | list[float]
    name: str | None = None
    distance: float
    weight: float | None = None
    share: float | None = Field(None, description="Of all that the memory moved; of explanations.")
    adds: list[float] | None = Field(None, description="To each of the outputs; of explanations.")


class Predicted(BaseModel):
    """Predictions: whole ones, or the likeliest classes."""

    version: int = Field(description="Of the memory.")
    labels: list[int] | None = Field(None, description="The corrected class of each query.")
    base: Probabilities | None = None
    corrected: Probabilities | None = None
    top: list[list[Output]] | None = None


class NeighborsFound(BaseModel):
    """The nearest memories of each query."""

    queries: list[list[Neighbor]]


class Explanation(BaseModel):
    """What corrected one prediction."""

    outputs: list[Output]
    neighbors: list[Neighbor]
    n_more: int = Field(description="Neighbours that are not listed.")
    share_of_more: float
    amount: float | None = Field(None, description="How much of the correction is used; of texts.")
    context: dict[str, str] | None = Field(None, description="The end of the text; of texts.")


class Explained(BaseModel):
    """What corrected each prediction."""

    queries: list[Explanation]
    version: int


class Added(BaseModel):
    """The new rows."""

    ids: list[int | str]
    rows: int
    version: int


class Forgotten(BaseModel):
    """How many rows are out of use."""

    forgotten: int
    rows: int
    version: int


class Refusal(BaseModel):
    """Why there is no answer."""

    type: str = Field(description="The error's, as in `residual_memory.errors`.")
    message: str
    cause: str
    remedy: str
    param: None = Field(None, description="As clients of OpenAI's expect it.")
    code: None = None


class Refused(BaseModel):
    """An error."""

    error: Refusal


class Working(BaseModel):
    """What is asked for is being worked out."""

    progress: float = Field(description="From 0 to 1.")


class Likelihoods(BaseModel):
    """Of each token of a text."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null of the first token of all.")
    top_logprobs: list[dict[str, float | None] | None] = Field(description="The likeliest tokens, and the one itself.")
    text_offset: list[int] = Field(description="Where each begins, counted in characters from the prompt's beginning.")


class Choice(BaseModel):
    """One completion."""

    index: int
    text: str
    logprobs: Likelihoods | None
    finish_reason: Literal["stop", "length"] | None


class Usage(BaseModel):
    """Tokens that were read and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completed(BaseModel):
    """Texts that go on; a stream has events of the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelCards(BaseModel):
    """All that is served."""

    object: Literal["list"]
    data: list[ModelCard]
