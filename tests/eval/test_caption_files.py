"""Files of captions: all supported formats, and one-line errors for other files."""

import pytest

from dali_llava.eval.caption_files import read_candidates, read_references


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "file.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize(
    "content",
    [
        'id,caption\nx,"A dog, barking"\ny,\n',
        '\ufeffcaption,id\r\n"A dog, barking",x\r\n,y\r\n\r\n',
        'file_name,caption,seconds\nx,"A dog, barking",1\ny,,2\n',
        '{"id": "x", "caption": "A dog, barking"}\n\n{"id": "y", "captions": [""], "n": 1}\n',
    ],
)
def test_candidates(write, content):
    assert read_candidates(write(content)) == {"x": "A dog, barking", "y": ""}


@pytest.mark.parametrize(
    "content",
    [
        "id,caption_1,caption_2\nx,a,b\n7,c,\n",
        '{"id": "x", "captions": ["a", "b"]}\n{"id": 7, "caption": "c"}\n',
    ],
)
def test_references(write, content):
    assert read_references(write(content)) == {"x": ["a", "b"], "7": ["c"]}


def test_references_of_audiocaps_have_the_ids_of_the_corpus(write):
    """The id is YOUTUBEID_START, as in the captions that `evaluate` writes, or another column on request."""
    path = write("audiocap_id,youtube_id,start_time,caption\n1,x,30,a\n2,-7,0,c\n3,x,30,b\n")
    assert read_references(path) == {"x_30": ["a", "b"], "-7_0": ["c"]}
    assert read_references(path, "youtube_id") == {"x": ["a", "b"], "-7": ["c"]}
    assert read_references(path, "audiocap_id") == {"1": ["a"], "2": ["c"], "3": ["b"]}
    with pytest.raises(
        ValueError, match="line 1: no column clip, but audiocap_id, youtube_id, .*; rename .*--id-column"
    ):
        read_references(path, "clip")


def test_ids_match_with_and_without_suffix_and_however_composed(write):
    references = write("file_name,caption_1,caption_2\nCafe\u0301.wav,a,b\n rain.WAV,c,d\n")
    assert read_references(references) == {"Caf\u00e9": ["a", "b"], "rain": ["c", "d"]}


def test_a_torn_row_is_named_and_the_rest_is_read(write, caplog):
    path = write("youtube_id,start_time,caption\nx,1,a man\nspeaks,,,\n,,\ny,2,rain\n")
    assert read_references(path) == {"x_1": ["a man"], "y_2": ["rain"]}
    torn = [record.getMessage() for record in caplog.records]
    assert len(torn) == 2 and "line 3: skipped a torn row (4 cells instead of 3)" in torn[0]
    assert "line 4: skipped a torn row (youtube_id and start_time are empty)" in torn[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "b", "caption": "rain"}\n{"id": "a", "caption": "a dog \\ud83d"}\n', "line 2: .* lone surrogate"),
        ('{"id": "a\\udc00", "caption": "a dog"}\n', "line 1: a string contains a lone surrogate"),
        ("id,caption,caption\na,b,c\n", "line 1: the column 'caption' appears twice"),
        ("youtube_id,start_time,caption\na,soon,b\n", "line 2: start_time 'soon' is not a number of seconds"),
    ],
)
def test_text_that_cannot_be_scored_is_named(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_references(write(content))


def test_line_breaks_in_cells(write):
    assert read_candidates(write('id,caption\nx,"one\ntwo"\ny,z\u2028z\n')) == {"x": "one\ntwo", "y": "z\u2028z"}


def test_corpora(shared_data, audiocaps):
    path = shared_data / "audiocaps" / "test.csv"
    assert read_references(path, "youtube_id") == audiocaps
    by_clip = read_references(path)  # the ids of the corpus: YOUTUBEID_START
    assert {name.rpartition("_")[0]: captions for name, captions in by_clip.items()} == audiocaps
    clotho = read_references(shared_data / "clotho" / "clotho_captions_evaluation_head.csv")
    assert len(clotho) == 200 and {len(captions) for captions in clotho.values()} == {5}
    assert clotho["Santa Motor"][1] == "A person is using electric clippers to trim bushes."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        (b"id,caption\nx,\xff\n", "byte 13 is not UTF-8"),
        ("id,caption\n", "the file has a header but no captions"),
        ("name,caption\nx,a\n", "line 1: no column id, file_name, youtube_id"),
        ("id,text\nx,a\n", "line 1: no column caption"),
        ("id,caption\nx,a, b\n", "line 2: 3 cells instead of 2"),
        ('id,caption\nx,"a" b\n', "line 2: .* check the double quotes"),
        ("id,caption\n ,a\n", "line 2: the id is blank"),
        ("id,caption\nx,a\nx,b\n", "line 3: id 'x' appears twice"),
        ("id,caption_1,caption_2\nx,a,b\n", "line 2: 2 captions; a candidates file has one"),
        ('{"id": "x", "caption": "a"}\n{"id"\n', "line 2: not JSON"),
        ('{"id": "x", "caption": "a"}\n[1]\n', "line 2: not an object"),
        ('{"caption": "a"}', "line 1: field id is missing"),
        ('{"id": "x", "text": "a"}', "line 1: no field caption"),
        ('{"id": "x", "captions": "a"}', "line 1: no field caption"),
    ],
)
def test_bad_candidates(write, content, message):
    path = write(content)
    with pytest.raises(ValueError, match=message) as error:
        read_candidates(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_bad_references(write, tmp_path):
    with pytest.raises(ValueError, match="line 2: id 'x' has only blank captions"):
        read_references(write("id,caption_1\nx, \n"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_references(tmp_path / "missing.csv")
