import pytest

from nextscale.base.errors import ConfigError
from nextscale.models.class_names import find_class, imagenet_names, imagenet_spellings

FEW = ["star", "Heart", "heart", "7"]


def find(word, names=None):
    names = imagenet_names() if names is None else names
    return find_class(word, names, len(names))


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (0, "tench"),
        (1, "goldfish"),
        (88, "macaw"),
        (207, "golden retriever"),
        (281, "tabby"),
        (388, "giant panda"),
        (417, "balloon"),
        (980, "volcano"),
        (999, "toilet tissue"),
    ],
)
def test_names_in_the_order_of_the_labels(label, name):
    assert imagenet_names()[label] == name
    assert find(name) == label and find(name.upper()) == label and find(str(label)) == label


def test_a_thousand_names_no_two_alike():
    assert len(imagenet_names()) == 1000
    assert len({name.lower() for name in imagenet_names()}) == 1000
    assert all(spelling == spelling.strip() != "" for each in imagenet_spellings() for spelling in each)


def test_every_name_finds_its_class():
    assert [find(name) for name in imagenet_names()] == list(range(1000))


@pytest.mark.parametrize(
    ("word", "label"),
    [
        ("tabby cat", 281),
        ("PARTRIDGE", 86),  # also a synonym of the ruffed grouse
        ("orca", 148),
        ("Cardigan Welsh Corgi", 264),
        ("cardigan", 474),
        ("crane bird", 134),
        ("construction crane", 517),
        ("maillot", 638),
        ("tank suit", 639),
    ],
)
def test_synonyms_and_names_told_apart(word, label):
    assert find(word) == label


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("crane", "it may be 134 (crane bird) or 517 (construction crane); give the number"),
        ("panda", "it may be 387 (lesser panda) or 388 (giant panda)"),
    ],
)
def test_an_ambiguous_word(word, says):
    with pytest.raises(ConfigError, match="is ambiguous") as caught:
        find(word)
    assert says in str(caught.value)


def test_an_unknown_word_names_the_closest():
    with pytest.raises(ConfigError) as caught:
        find("goldn retriever")
    assert str(caught.value).startswith(
        "the model has no class 'goldn retriever'; did you mean 'golden retriever', '"
    )
    with pytest.raises(ConfigError) as caught:
        find("retriever")
    assert "'flat-coated retriever', 'curly-coated retriever', 'golden retriever'" in str(caught.value)
    with pytest.raises(ConfigError, match="no class 'qqqq'; give a name, or a number of 0 to 999"):
        find("qqqq")


def test_a_models_own_names():
    assert find("STAR", FEW) == 0
    assert (find("Heart", FEW), find("heart", FEW)) == (1, 2)
    assert find("7", FEW) == 3 and find("2", FEW) == 2 and find("-1", FEW) == -1
    with pytest.raises(ConfigError, match=r"'HEART' is ambiguous: it may be 1 \(Heart\) or 2 \(heart\)"):
        find("HEART", FEW)
    with pytest.raises(ConfigError, match="no class 'orca'; give a name, or a number of 0 to 3"):
        find("orca", FEW)  # the synonyms are ImageNet's


def test_a_model_without_names():
    assert find_class("3", (), 10) == 3
    with pytest.raises(ConfigError, match="no class 'star'; give a name, or a number of 0 to 9"):
        find_class("star", (), 10)
