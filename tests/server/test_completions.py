"""OpenAI's own client against `/v1/completions` on a real socket, beside the library's `generate` and `score`."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
openai = pytest.importorskip("openai", reason="openai is not installed")
import torch  # noqa: E402

from residual_memory.errors import CorruptFile  # noqa: E402
from residual_memory.server import Limits, completions  # noqa: E402
from residual_memory.server.completions import Said, Sampling, Text  # noqa: E402
from residual_memory.server.text_service import TextService  # noqa: E402
from tests.server.conftest import BEARER, TOKEN, Address, running  # noqa: E402
from tests.server.texts import Library, library  # noqa: E402

MODEL = "memory"
PROMPTS = ["the cat saw a", "the owl", "a bell the cat saw", " mouse the"]


@pytest.fixture(scope="module")
def made() -> Library:
    return library()


@pytest.fixture(scope="module")
def address(made: Library) -> Iterator[Address]:
    with running(made.app()) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: Address) -> Iterator[Any]:
    with client_of(address) as client:
        yield client


def client_of(address: Address, token: str = TOKEN) -> Any:
    return openai.OpenAI(base_url=f"{address.url}/v1", api_key=token, max_retries=0)


def generated(made: Library, prompt: str, n: int) -> str:
    """What `generate` makes greedily, without its end."""
    tokens = made.tokens(prompt)
    found = made.lm.generate(tokens, max_new_tokens=n, do_sample=False, pad_token_id=0)[0, tokens.shape[1] :].tolist()
    return str(made.tokenizer.decode(found[: found.index(0)] if 0 in found else found))


# ---------------------------------------------------------------------- what is said


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_generate(client: Any, made: Library, prompt: str) -> None:
    found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0)
    (choice,) = found.choices
    assert choice.text == generated(made, prompt, 24)
    assert (found.object, found.model, choice.index, choice.logprobs) == ("text_completion", MODEL, 0, None)
    n_prompt = made.tokens(prompt).shape[1]
    assert found.usage.prompt_tokens == n_prompt
    assert found.usage.total_tokens == n_prompt + found.usage.completion_tokens


def test_the_memory_is_in_the_text(client: Any, made: Library) -> None:
    prompt = PROMPTS[0]
    tokens = made.tokens(prompt)
    alone = made.lm.model.eval().generate(tokens, max_new_tokens=24, do_sample=False, pad_token_id=0)
    found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=24, temperature=0)
    assert found.choices[0].text != made.tokenizer.decode(alone[0, tokens.shape[1] :])


def test_log_probabilities_of_an_echoed_prompt_are_those_of_the_library(client: Any, made: Library) -> None:
    """As lm-evaluation-harness asks for them: echo, no new token, one alternative."""
    text = made.tokenizer.decode(made.documents[3])
    found = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=1, temperature=0)
    choice = found.choices[0]
    scores = made.lm.score([{"input_ids": made.documents[3]}])
    told = choice.logprobs
    assert choice.text == text == "".join(told.tokens)
    assert told.token_logprobs[0] is None
    assert told.top_logprobs[0] is None
    assert sum(told.token_logprobs[1:]) == pytest.approx(-scores.corrected_loss.sum(), abs=1e-3)
    greedy = [max(top, key=top.get) == token for token, top in zip(told.tokens[1:], told.top_logprobs[1:], strict=True)]
    assert greedy == scores.corrected_hit.tolist()
    assert found.usage.completion_tokens == 0
    assert choice.finish_reason == "length"


def test_answers_to_choose_from_are_scored_as_lm_evaluation_harness_scores_them(client: Any, made: Library) -> None:
    """Token lists, one new token, which it cuts off again; a document's end may be that token."""
    document = made.documents[3]
    pairs = [(document[:5], document[5:9]), (document[:7], document[7:]), (document, [0])]
    prompts = [context + answer for context, answer in pairs]
    found = client.completions.create(
        model=MODEL, prompt=prompts, max_tokens=1, echo=True, logprobs=1, temperature=0, seed=1234
    )
    for (context, answer), choice in zip(pairs, found.choices, strict=True):
        scores = made.lm.score([{"input_ids": context + answer}])
        told = choice.logprobs
        assert len(told.tokens) == len(context + answer) + 1
        assert sum(told.token_logprobs[len(context) : -1]) == pytest.approx(
            -scores.corrected_loss[len(context) - 1 :].sum(), abs=1e-3
        )


def test_a_prompt_is_scored_alike_in_pieces(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"model": MODEL, "prompt": PROMPTS[2], "max_tokens": 2, "echo": True, "logprobs": 2, "temperature": 0}
    whole = client.completions.create(**asked).choices[0]
    monkeypatch.setattr(completions, "LOGIT_BYTES", 3 * 4 * 320)
    pieces = client.completions.create(**asked).choices[0]
    assert pieces.text == whole.text
    assert pieces.logprobs.token_logprobs[1:] == pytest.approx(whole.logprobs.token_logprobs[1:], abs=1e-4)


def test_offsets_say_where_each_token_begins_in_prompt_and_text(client: Any) -> None:
    prompt = PROMPTS[0]
    echoed = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, echo=True, logprobs=0, temperature=0)
    plain = client.completions.create(model=MODEL, prompt=prompt, max_tokens=6, logprobs=0, temperature=0)
    text, told = echoed.choices[0].text, echoed.choices[0].logprobs
    assert text == prompt + plain.choices[0].text
    for (start, end), token in zip(pairwise([*told.text_offset, len(text)]), told.tokens, strict=True):
        assert text[start:end] == token or token.startswith("token ")
    assert plain.choices[0].logprobs.text_offset == told.text_offset[-6:]
    assert plain.choices[0].logprobs.text_offset[0] == len(prompt)
    assert all(list(top) == [token] for token, top in zip(told.tokens[1:], told.top_logprobs[1:], strict=True))


def test_alternatives_are_the_likeliest_and_the_token_itself(client: Any, made: Library) -> None:
    asked = {"model": MODEL, "prompt": PROMPTS[1], "max_tokens": 4, "logprobs": 5, "temperature": 2.0, "seed": 5}
    told = client.completions.create(**asked).choices[0].logprobs
    said = made.lm(made.tokens(PROMPTS[1])).logits[0, -1].log_softmax(0)
    for token, value, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] == value
        assert 5 <= len(top) <= 6
    assert max(told.top_logprobs[0].values()) == pytest.approx(float(said.max()), abs=1e-5)


def test_tokens_and_lists_are_prompts_too(client: Any, made: Library) -> None:
    def texts(prompt: Any) -> list[str]:
        found = client.completions.create(model=MODEL, prompt=prompt, max_tokens=5, temperature=0)
        assert [choice.index for choice in found.choices] == list(range(len(found.choices)))
        return [choice.text for choice in found.choices]

    tokens = [made.tokens(prompt)[0].tolist() for prompt in PROMPTS]
    wanted = [texts(prompt)[0] for prompt in PROMPTS]
    assert texts(PROMPTS) == wanted
    assert texts(tokens) == wanted
    assert texts(tokens[0]) == wanted[:1]


def test_several_texts_of_a_prompt_differ_and_a_seed_repeats_them(client: Any) -> None:
    asked = {"model": MODEL, "prompt": PROMPTS[:2], "n": 2, "max_tokens": 12, "seed": 7}
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(texts) == len(set(texts)) == 4
    other = client.completions.create(**{**asked, "seed": 8})
    assert texts != [choice.text for choice in other.choices]


@pytest.mark.parametrize("options", [{"top_p": 1e-6}, {"temperature": 1e-300}, {"temperature": 1e-3}])
def test_a_small_nucleus_and_a_low_temperature_are_greedy(
    client: Any, made: Library, options: dict[str, float]
) -> None:
    found = client.completions.create(model=MODEL, prompt=PROMPTS[0], max_tokens=10, seed=1, **options)
    assert found.choices[0].text == generated(made, PROMPTS[0], 10)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    choose = Sampling(1.0, 1.0, torch.Generator().manual_seed(0))
    seen = torch.bincount(torch.tensor([choose(shares.log()) for _ in range(4000)])).double() / 4000
    torch.testing.assert_close(seen, shares, atol=0.03, rtol=0)
    nucleus = Sampling(1.0, 0.75, torch.Generator().manual_seed(0))  # the fewest tokens that have it: two
    seen = torch.bincount(torch.tensor([nucleus(shares.log()) for _ in range(4000)]), minlength=4).double() / 4000
    torch.testing.assert_close(seen, torch.tensor([0.625, 0.375, 0, 0], dtype=torch.float64), atol=0.03, rtol=0)


# ---------------------------------------------------------------------- where it ends


def test_a_stop_ends_the_text_and_is_no_part_of_it(client: Any, made: Library) -> None:
    whole = generated(made, PROMPTS[0], 24)
    stop = whole[5:9]
    place = whole.find(stop)
    asked = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 24, "temperature": 0, "logprobs": 0}
    found = client.completions.create(**asked, stop=[stop, "never said"]).choices[0]
    assert found.text == whole[:place]
    assert found.finish_reason == "stop"
    assert all(offset < len(PROMPTS[0]) + place for offset in found.logprobs.text_offset)
    streamed = [event.choices[0] for event in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(choice.text for choice in streamed) == found.text
    assert [
        offset for choice in streamed if choice.logprobs for offset in choice.logprobs.text_offset
    ] == found.logprobs.text_offset
    assert streamed[-1].finish_reason == "stop"


def test_what_might_have_become_a_stop_is_given_at_the_end(client: Any, made: Library) -> None:
    whole = generated(made, PROMPTS[0], 8)
    found = client.completions.create(
        model=MODEL, prompt=PROMPTS[0], max_tokens=8, temperature=0, stop=whole[-2:] + "and more"
    )
    assert found.choices[0].text == whole
    assert found.choices[0].finish_reason == "length"


def test_the_end_of_a_document_ends_the_text(client: Any, made: Library) -> None:
    """Whatever `generate` stops at."""
    ended = [prompt for prompt in (made.tokenizer.decode(some) for some in made.documents) if _ends(made, prompt)]
    assert ended, "no document ends where the memory says so"
    found = client.completions.create(model=MODEL, prompt=ended[0], max_tokens=3, temperature=0, logprobs=0)
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason, found.usage.completion_tokens) == ("", "stop", 1)
    assert (choice.logprobs.tokens, choice.logprobs.text_offset) == (["<|end|>"], [len(ended[0])])


def _ends(made: Library, prompt: str) -> bool:
    return int(made.lm(made.tokens(prompt)).logits[0, -1].argmax()) == 0


# ---------------------------------------------------------------------- streams


def test_a_stream_says_what_the_whole_says(client: Any) -> None:
    asked = {"model": MODEL, "prompt": PROMPTS[:2], "max_tokens": 9, "temperature": 0, "logprobs": 1, "echo": True}
    whole = client.completions.create(**asked)
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert len({event.id for event in events}) == 1
    for wanted in whole.choices:
        parts = [event.choices[0] for event in events[:-1] if event.choices[0].index == wanted.index]
        assert "".join(part.text for part in parts) == wanted.text
        assert len(parts) > 9
        assert [part.finish_reason for part in parts] == [*[None] * (len(parts) - 1), wanted.finish_reason]
        for name in ("tokens", "text_offset", "top_logprobs", "token_logprobs"):
            joined = [value for part in parts for value in getattr(part.logprobs, name)]
            assert joined == getattr(wanted.logprobs, name)


def test_a_stream_ends_as_openai_says(address: Address) -> None:
    connection = http.client.HTTPConnection(address.host, address.port, timeout=20)
    body = json.dumps({"prompt": "the cat", "max_tokens": 3, "stream": True})
    connection.request("POST", "/v1/completions", body, BEARER)
    answer = connection.getresponse()
    assert answer.getheader("content-type", "").startswith("text/event-stream")
    lines = [line for line in answer.read().split(b"\n\n") if line]
    assert all(line.startswith(b"data: ") for line in lines)
    assert lines[-1] == b"data: [DONE]"
    connection.close()


@pytest.mark.parametrize("text", ["café au lait ☃ ok", "日本語", "a 🎉"])
def test_characters_of_several_tokens_come_whole(client: Any, text: str) -> None:
    asked = {"model": MODEL, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1}
    events = [event.choices[0] for event in client.completions.create(**asked, stream=True)]
    assert "".join(event.text for event in events) == text
    assert not any("\ufffd" in event.text for event in events)
    tokens = [token for event in events if event.logprobs for token in event.logprobs.tokens]
    assert any(token.startswith("token ") for token in tokens)


def test_a_stop_within_a_character_is_none(made: Library) -> None:
    """Bytes that are no text at all are given out when nothing comes any more."""
    service = TextService(made.lm, made.tokenizer)
    half = made.tokenizer("☃").input_ids[:1]
    text = Text(service, (), 0, ["\ufffd\ufffd"])
    assert text.add(Said(half[0], text.end)).text == ""
    rest = text.rest()
    assert rest.text == "\ufffd"
    assert [said.token for said in rest.tokens] == half


# ---------------------------------------------------------------------- refusals


def test_refusals_are_the_errors_that_the_client_knows(client: Any, address: Address, made: Library) -> None:
    with pytest.raises(openai.AuthenticationError), client_of(address, "a-token-that-is-wrong") as stranger:
        stranger.completions.create(model=MODEL, prompt="the")
    with pytest.raises(openai.NotFoundError, match="'memory'"):
        client.completions.create(model="gpt-4", prompt="the")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n: "),
        ({"logprobs": 99}, "logprobs"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "the end"}, "suffix"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"prompt": []}, "0 prompts"),
        ({"prompt": ["a"] * 65}, "65 prompts"),
        ({"prompt": [[]]}, "no token"),
        ({"prompt": [320]}, "token 320"),
        ({"prompt": [2**70]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": {"text": "the"}}, "prompt"),
        ({"prompt": [1] * 250, "max_tokens": 8}, "250 tokens"),
    ],
)
def test_a_parameter_that_cannot_be_served_is_refused_by_name(
    client: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match=message) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "the", **options})
    assert set(caught.value.body) >= {"message", "type", "param", "code"}


def test_the_last_token_needs_no_room(client: Any) -> None:
    found = client.completions.create(model=MODEL, prompt=[1] * 250, max_tokens=7, temperature=0)
    assert found.usage.total_tokens <= 257


def test_options_without_effect_are_no_trouble(client: Any) -> None:
    found = client.completions.create(
        model=MODEL, prompt="the", max_tokens=1, best_of=1, logit_bias={}, frequency_penalty=0, user="me", suffix=None
    )
    assert len(found.choices) == 1


def test_the_model_is_listed(client: Any) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "residual-memory"


def test_a_token_without_the_scope_is_refused(made: Library) -> None:
    with running(made.app(token={"a-token-that-only-writes": {"write"}})) as address:
        with client_of(address, "a-token-that-only-writes") as client, pytest.raises(openai.PermissionDeniedError):
            client.completions.create(model=MODEL, prompt="the")


# ---------------------------------------------------------------------- time


@contextlib.contextmanager
def slow(made: Library, limits: Limits | None = None) -> Iterator[tuple[Address, list[float]]]:
    """A server whose model takes 20 ms for each pass, and when it passed; no text ends by itself."""
    passes: list[float] = []

    def wait(*_: Any) -> None:
        passes.append(time.monotonic())
        time.sleep(0.02)

    app = made.app(limits=limits)
    app.state.service.ends = set()
    handle = made.lm.model.register_forward_pre_hook(wait)
    try:
        with running(app) as address:
            yield address, passes
    finally:
        handle.remove()


def idle_within(passes: list[float], seconds: float) -> bool:
    """Whether the model passes no more, so long after now."""
    time.sleep(seconds)
    seen = len(passes)
    time.sleep(0.2)
    return len(passes) == seen


def test_a_stream_may_take_longer_than_an_answer(made: Library) -> None:
    with slow(made, Limits(answer_seconds=0.7)) as (address, passes), client_of(address) as client:
        events = list(client.completions.create(model=MODEL, prompt="the", max_tokens=60, stream=True))
    assert events[-1].choices[0].finish_reason == "length"
    assert passes[-1] - passes[0] > 0.7


def test_an_answer_that_takes_too_long_is_refused_and_no_more_of_it_made(made: Library) -> None:
    with slow(made, Limits(answer_seconds=0.7)) as (address, passes), client_of(address) as client:
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="the", max_tokens=200)
        assert caught.value.status_code == 503
        assert idle_within(passes, 0.2)
    assert len(passes) < 60


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_work(made: Library, stream: bool) -> None:
    with slow(made) as (address, passes):
        for _ in range(3):  # more often than there are places
            connection = address.connect()
            body = json.dumps({"prompt": "the", "max_tokens": 200, "stream": stream}).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {TOKEN}\r\n"
            before = len(passes)
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            while len(passes) < before + 3:
                time.sleep(0.005)
            connection.close()
        assert idle_within(passes, 0.2)
        assert len(passes) < 60
        with client_of(address) as client:
            assert client.completions.create(model=MODEL, prompt="the", max_tokens=2).usage.completion_tokens == 2


def test_more_than_can_wait_are_told_to_come_again(made: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completions, "WAITING", 1)
    outcomes: list[tuple[int, str | None]] = []

    def ask(address: Address) -> None:
        with client_of(address) as client:
            found = client.completions.with_raw_response
            try:
                outcomes.append((found.create(model=MODEL, prompt="the", max_tokens=30).status_code, None))
            except openai.RateLimitError as error:
                outcomes.append((error.status_code, error.response.headers["retry-after"]))

    with slow(made) as (address, _):
        threads = [threading.Thread(target=ask, args=(address,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert len(outcomes) == 8
    assert set(outcomes) == {(200, None), (429, "1")}
    assert outcomes.count((200, None)) >= 3  # two at a time, and one that waits


def test_a_failure_in_the_middle_of_a_stream_is_told(made: Library) -> None:
    app = made.app()
    app.state.service.ends = set()
    n = 0

    def fail(*_: Any) -> None:
        nonlocal n
        n += 1
        if n == 4:
            raise CorruptFile("a column is damaged; run resmem salvage")

    handle = made.lm.model.register_forward_pre_hook(fail)
    try:
        with running(app) as address, client_of(address) as client:
            events = client.completions.create(model=MODEL, prompt="the", max_tokens=9, stream=True)
            with pytest.raises(openai.APIError, match="damaged"):
                list(events)
    finally:
        handle.remove()
