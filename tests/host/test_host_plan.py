"""Who is told what USP Loader's values would come to, and of which files."""

import json
import urllib.error
import urllib.request

import pytest

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("body", "headers", "code", "said"),
    [
        ({"gpus": "cpu:2"}, {"Origin": "http://evil.example"}, 403, ""),
        ({"gpus": "cpu:2"}, {"Sec-Fetch-Site": "cross-site"}, 403, ""),
        ({"gpus": "cpu:2"}, {"Content-Type": "text/plain"}, 415, "Send JSON"),
        (
            {"gpus": 2},
            {},
            400,
            "Send USP Loader's inputs by their names: Expected `str | null`, got `int` - at `$.gpus`",
        ),
        (["cpu:2"], {}, 400, "Send USP Loader's inputs by their names"),
    ],
)
def test_who_is_answered(host, body, headers, code, said):
    request = urllib.request.Request(
        f"http://127.0.0.1:{host.port}/fastusp/plan",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"} | headers,
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    assert error.value.code == code
    assert not said or json.loads(error.value.read())["error"].startswith(said)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "no.safetensors [checkpoints]"])
def test_only_files_that_comfyui_lists(host, name):
    answer = host.post("/fastusp/plan", {"gpus": "cpu:2", "unet_name": name})
    assert answer["problem"].startswith("unet_name: choose another file, or put ")
