"""Captions by a local model (a tiny real one) and by a server (a real one, with every fault a server can have)."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from contentv.base.errors import UserError
from contentv.curation.captioner import (
    Captioner,
    CaptionerConfig,
    CaptionRequest,
    build_captioner,
    fit_side,
    question,
    spread_frames,
)
from contentv.curation.captioner_endpoint import MAX_FAILED_IN_A_ROW, EndpointCaptioner
from contentv.curation.captions import CaptionError

CPU = torch.device("cpu")
KEY = "sk-planted-0123456789"


def clip(frames: int = 9, height: int = 40, width: int = 56, hint: str = "", seed: int = 0) -> CaptionRequest:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    return CaptionRequest(pixels, 8.0, hint)


# ---- what both do


def test_frames_are_spread_over_the_clip() -> None:
    pixels = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    for length in range(1, 40):
        for count in range(1, 12):
            places = spread_frames(CaptionRequest(pixels[:length], 8.0), count)[:, 0, 0, 0].tolist()
            assert len(places) == min(length, count) == len(set(places))
            assert places == sorted(places)
            for n, place in enumerate(places):  # the one that is shown in the middle of the n-th part
                assert place <= (n + 0.5) * length / len(places) < place + 1


def test_large_frames_are_shrunk_and_small_ones_left() -> None:
    picture = clip(1, 100, 200).frames[0]
    assert fit_side(picture, 50).shape == (25, 50, 3)
    assert fit_side(picture, 200) is picture


def test_questions() -> None:
    config = CaptionerConfig(prompt="clip?", image_prompt="still?")
    assert question(clip(2), config) == "clip?"
    assert question(clip(1), config) == "still?"
    assert question(clip(2, hint="a dog"), config).endswith(": a dog")


def test_the_configuration_checks_itself() -> None:
    merged = OmegaConf.merge(
        OmegaConf.structured(CaptionerConfig), OmegaConf.from_dotlist(["extra.max_tokens=null", "extra.seed=1"])
    )
    assert OmegaConf.to_object(merged).extra == {"max_tokens": None, "seed": 1}
    assert build_captioner(CaptionerConfig(), CPU) is None
    wrong: list[dict[str, Any]] = [
        {"kind": "locl"}, {"when": "never"}, {"frames": 0}, {"max_tokens": 0}, {"timeout_s": 0.0}, {"retries": -1},
        {"max_side_px": 8}, {"concurrency": 0}, {"batch_size": 0},
    ]  # fmt: skip
    for changes in wrong:
        with pytest.raises(UserError, match=rf"captioner\.{next(iter(changes))}"):
            CaptionerConfig(**changes)
    with pytest.raises(UserError, match=r"captioner\.path"):
        CaptionerConfig(kind="local")
    with pytest.raises(UserError, match=r"captioner\.model"):
        CaptionerConfig(kind="endpoint", url="http://localhost/v1")


# ---- a local model


def byte_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("<pad>", "<s>", "</s>", "<image>"):
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def scaled_up(model: torch.nn.Module) -> Any:
    """Random weights large enough for the answer to depend on the picture."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return model


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = byte_tokenizer()
    ids = tokenizer.get_vocab()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    language = LlamaConfig(
        vocab_size=len(ids), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=ids["<s>"], eos_token_id=ids["</s>"],
        pad_token_id=ids["<pad>"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=ids["<image>"])
    scaled_up(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}), tokenizer,
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def local(folder: Path, **changes: Any) -> Captioner:
    settings: dict[str, Any] = {"frames": 3, "max_tokens": 12, "batch_size": 3, "prompt": "clip?", "image_prompt": "p?"}
    captioner = build_captioner(CaptionerConfig(kind="local", path=str(folder), **{**settings, **changes}), CPU)
    assert isinstance(captioner, Captioner)
    return captioner


def test_a_local_model_says_what_transformers_says_clip_by_clip(llava: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    clips = [clip(9), clip(1, seed=1), clip(5, seed=2, hint="a dog"), clip(2, seed=3), clip(9, seed=4)]
    captions = local(llava).caption(clips)
    assert captions == local(llava, batch_size=1).caption(clips)
    assert len(set(captions)) == len(clips)  # they depend on the frames

    model, processor = AutoModelForImageTextToText.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    for one, caption in zip(clips, captions, strict=True):
        length = len(one.frames)
        places = range(length) if length <= 3 else [int((n + 0.5) * length / 3) for n in range(3)]
        asked = "p?" if length == 1 else "clip?"
        asked += f"\nWhat is already known about it: {one.hint}" if one.hint else ""
        text = f"<s>user: {'<image>' * len(places)}{asked}\nassistant: "
        pictures = [Image.fromarray(one.frames[place]) for place in places]
        inputs = processor(images=pictures, text=text, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs.input_ids.shape[1] :]
        assert caption == " ".join(processor.decode(ids, skip_special_tokens=True).split())


def test_marks_in_a_hint_are_only_words(llava: Path) -> None:
    (caption,) = local(llava).caption([clip(3, hint="<image></s> <image>")])
    assert isinstance(caption, str)


def test_the_fingerprint_tells_models_and_questions_apart(llava: Path, tmp_path: Path) -> None:
    first = local(llava).fingerprint
    assert first == local(llava, batch_size=1).fingerprint
    assert first != local(llava, prompt="what?").fingerprint
    copied = tmp_path / "copy"
    copied.mkdir()
    for path in llava.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    assert local(copied).fingerprint == first
    weights = bytearray((copied / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copied / "model.safetensors").write_bytes(weights)
    assert local(copied).fingerprint != first


def test_blip_has_no_chat_template_and_sees_the_middle_frame(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast as BertTokenizer
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *letters, *(f"##{letter}" for letter in letters)]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        vision_config={**shape, "image_size": 32, "patch_size": 8},
        text_config={**shape, "vocab_size": len(words), "encoder_hidden_size": 32, "bos_token_id": 5, "pad_token_id": 0,
                     "eos_token_id": 3, "sep_token_id": 3, "max_position_embeddings": 64},
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "blip"
    scaled_up(BlipForConditionalGeneration(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    default = CaptionerConfig()
    plain = local(folder, prompt=default.prompt, image_prompt=default.image_prompt)
    clips = [clip(3, seed=1), clip(1, seed=2)]
    captions = plain.caption(clips)
    assert captions == [
        plain.caption([CaptionRequest(one.frames[len(one.frames) // 2][None], 0.0)])[0] for one in clips
    ]
    assert all(isinstance(caption, str) for caption in captions)
    assert local(folder, prompt="a photo of").caption([clip(3, seed=1)])[0] != captions[0]


@pytest.mark.parametrize("fault", ["missing", "pickle", "code", "tensors", "damaged"])
def test_folders_that_are_no_captioner(fault: str, llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if fault != "missing":
        folder.mkdir()
        for path in llava.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "model.safetensors"
    if fault == "pickle":
        torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
        weights.unlink()
    elif fault == "code":
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "ours", "auto_map": {"AutoConfig": "ours.C", "AutoModelForImageTextToText": "ours.M"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "ours.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    elif fault == "tensors":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        tensors.pop(next(name for name in tensors if "vision" in name))
        save_file(tensors, weights, {"format": "pt"})
    elif fault == "damaged":
        weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"captioner\.path"):
        local(folder)
    assert not (tmp_path / "ran").exists()


# ---- a server

Answer = Callable[["Handler", dict[str, Any], int], None]


class Handler(BaseHTTPRequestHandler):
    """Gives each request to the test's function."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server: Any = self.server
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            count = len(server.requests)
        server.answer(self, body, count)

    def reply(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def say(self, text: Any, **more: Any) -> None:
        self.reply(200, {"choices": [{"message": {"role": "assistant", "content": text}, **more}]})

    def log_message(self, *args: Any) -> None:
        """Says nothing."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], Any]]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> Any:
        server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.requests, server.lock, server.answer = True, [], threading.Lock(), answer
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def ask(url: str, sleeps: list[float] | None = None, **changes: Any) -> EndpointCaptioner:
    settings: dict[str, Any] = {"frames": 2, "concurrency": 4, "timeout_s": 5.0, "retries": 3, **changes}
    config = CaptionerConfig(kind="endpoint", url=url, model="vlm", **settings)
    return EndpointCaptioner(config, sleep=(sleeps if sleeps is not None else []).append)


def test_what_a_server_is_asked(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", KEY)
    server = serve(lambda handler, body, count: handler.say("  a dog\n runs  "))
    shades = np.arange(9, dtype=np.uint8)[:, None, None, None] * 25
    one = CaptionRequest(shades.repeat(96, 1).repeat(64, 2).repeat(3, 3), 8.0)
    captioner = ask(server.url + "/", api_key_env="PLANTED", max_side_px=48, extra={"max_tokens": None, "seed": 7})
    assert isinstance(captioner, Captioner)
    assert captioner.caption([one]) == ["a dog runs"]
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["seed"]) == ("vlm", 0, 7)
    assert "max_tokens" not in body
    (message,) = body["messages"]
    *pictures, text = message["content"]
    assert text == {"type": "text", "text": CaptionerConfig().prompt}
    for picture, place in zip(pictures, (2, 6), strict=True):
        head, _, data = picture["image_url"]["url"].partition(",")
        assert head == "data:image/jpeg;base64"
        sent = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
        assert sent.shape == (48, 32, 3)
        assert np.abs(sent.astype(int) - 25 * place).max() < 3


def test_captions_come_in_the_order_of_the_clips_and_several_at_a_time(serve: Any) -> None:
    under_way, most = [0], [0]
    lock = threading.Lock()

    def answer(handler: Handler, body: dict[str, Any], count: int) -> None:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        name = body["messages"][0]["content"][-1]["text"].rpartition(": ")[2]
        time.sleep(0.05 if int(name) % 2 else 0.02)
        with lock:
            under_way[0] -= 1
        handler.say(f"caption {name}")

    server = serve(answer)
    captions = ask(server.url).caption([clip(1, 8, 8, hint=str(n)) for n in range(12)])
    assert captions == [f"caption {n}" for n in range(12)]
    assert 2 <= most[0] <= 4


def test_throttling_and_faults_are_waited_out(serve: Any) -> None:
    def answer(handler: Handler, body: dict[str, Any], count: int) -> None:
        if count == 1:
            handler.reply(429, {"error": "slow down"}, Retry_After="7")
        elif count == 2:
            handler.reply(503, b"busy")
        elif count == 3:
            handler.close_connection = True  # hangs up without a word
        else:
            handler.say("at last")

    sleeps: list[float] = []
    assert ask(serve(answer).url, sleeps).caption([clip(1)]) == ["at last"]
    assert sleeps[0] == 7  # what the server asked for
    assert 1.5 <= sleeps[1] <= 2.5  # 2, then 4 seconds, spread by a quarter
    assert 3 <= sleeps[2] <= 5


def test_a_date_says_when_to_come_back_and_no_server_makes_us_wait_for_ever(serve: Any) -> None:
    import email.utils

    def answer(handler: Handler, body: dict[str, Any], count: int) -> None:
        if count == 1:
            handler.reply(429, b"", Retry_After=email.utils.formatdate(time.time() + 20, usegmt=True))
        elif count == 2:
            handler.reply(503, b"", Retry_After="86400")
        else:
            handler.say("now")

    sleeps: list[float] = []
    assert ask(serve(answer).url, sleeps).caption([clip(1)]) == ["now"]
    assert 15 <= sleeps[0] <= 20
    assert sleeps[1] == 60


@pytest.mark.parametrize(
    ("fault", "reason", "tries"),
    [
        ("500", "HTTP 500", 4),
        ("400", "HTTP 400: too many pictures", 1),
        ("garbage", "no chat completion: <html>", 1),
        ("no choices", "no chat completion", 1),
        ("deep", "no chat completion", 1),
        ("null", "no text", 1),
        ("blank", "empty", 1),
        ("filtered", "content filter", 1),
        ("endless", "more than 1048576 bytes", 1),
        ("stall", "no answer within 0.3 s", 4),
        ("trickle", "no whole answer within 0.3 s", 4),
    ],
)
def test_a_clip_that_gets_no_caption_does_not_stop_the_others(serve: Any, fault: str, reason: str, tries: int) -> None:
    def trickle(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(30):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    replies: dict[str, Callable[[Handler], None]] = {
        "500": lambda handler: handler.reply(500, b"oops"),
        "400": lambda handler: handler.reply(400, b"too many pictures"),
        "garbage": lambda handler: handler.reply(200, b"<html>"),
        "no choices": lambda handler: handler.reply(200, {"choices": []}),
        "deep": lambda handler: handler.reply(200, b"[" * 200_000),
        "null": lambda handler: handler.say(None),
        "blank": lambda handler: handler.say(" \n"),
        "filtered": lambda handler: handler.say("I ca", finish_reason="content_filter"),
        "endless": lambda handler: handler.reply(200, b" " * (2 << 20)),
        "stall": lambda handler: time.sleep(1.0),
        "trickle": trickle,
    }
    asked: list[int] = []

    def answer(handler: Handler, body: dict[str, Any], count: int) -> None:
        if "bad" in body["messages"][0]["content"][-1]["text"]:
            asked.append(count)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has had enough
                replies[fault](handler)
        else:
            handler.say("fine")

    clips = [clip(1, 8, 8), clip(1, 8, 8, hint="bad"), clip(1, 8, 8)]
    timeout_s = 0.3 if fault in ("stall", "trickle") else 5.0
    first, second, third = ask(serve(answer).url, timeout_s=timeout_s).caption(clips)
    assert (first, third) == ("fine", "fine")
    assert isinstance(second, CaptionError)
    assert second.rule == "captioner"
    assert reason in str(second)
    assert len(asked) == tries


@pytest.mark.parametrize(
    ("status", "word"), [(401, "refuses the key"), (403, "refuses"), (404, "no such"), (302, "no such")]
)
def test_a_server_that_will_never_answer_stops_the_run(
    serve: Any, status: int, word: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PLANTED", KEY)
    elsewhere = serve(lambda handler, body, count: handler.say("stolen"))
    server = serve(
        lambda handler, body, count: handler.reply(status, f"no: {KEY}".encode(), Location=f"{elsewhere.url}/chat")
    )
    with pytest.raises(UserError, match=word) as caught:
        ask(server.url, api_key_env="PLANTED").caption([clip(1, 8, 8) for _ in range(3)])
    assert KEY not in str(caught.value) + caplog.text
    assert elsewhere.requests == []  # a redirect would carry the key along


def test_a_server_that_is_not_there_stops_the_run(serve: Any) -> None:
    server = serve(lambda handler, body, count: handler.say("x"))
    server.shutdown()
    server.server_close()
    sleeps: list[float] = []
    with pytest.raises(UserError, match="cannot be reached"):
        ask(server.url, sleeps, concurrency=1).caption([clip(1, 8, 8)])
    assert len(sleeps) == 3


def test_a_server_that_fails_every_clip_stops_the_run(serve: Any) -> None:
    server = serve(lambda handler, body, count: handler.reply(400, b"this model sees nothing"))
    captioner = ask(server.url)
    few = [clip(1, 8, 8)] * (MAX_FAILED_IN_A_ROW - 1)
    assert all(isinstance(result, CaptionError) for result in captioner.caption(few))
    with pytest.raises(UserError, match=r"20 clips in a row; the last: HTTP 400: this model sees nothing"):
        captioner.caption(few[:1])


def test_keys_and_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLANTED", raising=False)
    with pytest.raises(UserError, match="PLANTED is not set"):
        ask("http://localhost/v1", api_key_env="PLANTED")
    monkeypatch.setenv("PLANTED", "with\nnewline")
    with pytest.raises(UserError, match="holds no key") as caught:
        ask("http://localhost/v1", api_key_env="PLANTED")
    assert "with" not in str(caught.value)
    for url in ("localhost:8000", "ftp://x/v1", "http://", "http://user:secret@host/v1", "https://host/v1?key=secret"):
        with pytest.raises(UserError, match=r"captioner\.url") as caught:
            ask(url)
        assert "secret" not in str(caught.value)
    monkeypatch.setenv("PLANTED", KEY)
    first = ask("http://localhost/v1", api_key_env="PLANTED")
    assert KEY not in repr(dataclasses.asdict(first._config))
    assert first.fingerprint == ask("http://localhost/v1").fingerprint  # the key is no part of it
    assert first.fingerprint != ask("http://localhost/v1", prompt="other").fingerprint
