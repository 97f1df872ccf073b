import unicodedata

import pytest

from tinyllm.corpus.normalize import normalize

VERSE = "MACBETH\n  So foul and fair\ta day\n\n    I have not seen.\n\n\nBANQUO  How far?"


def clean(text, drop_lines=(), scrub=False):
    return normalize(text, drop_lines, scrub)


def test_verse_keeps_its_lines_and_indentation():
    assert clean(VERSE).text == VERSE


def test_twice_is_once():
    odd = "\ufeffa\u0301\r\nb\x00\x0c c  \n\n\n\n\n\nd\u2028e\u2029f\u00ad\u200b \n"
    once = clean(odd).text
    assert once == "\u00e1\nb\n c\n\n\nd\ne\nf"
    assert clean(once).text == once
    assert unicodedata.is_normalized("NFC", once)


@pytest.mark.parametrize("text", ["schön — “ja”", "你好，世界", "naïve café €5", "Ωμέγα"])
def test_good_text_is_not_repaired(text):
    assert clean(text) == (text, False, 0, 0)


def test_mojibake_is_repaired():
    broken = "Itâ€™s schÃ¶n"
    assert clean(broken)[:2] == ("It’s schön", True)


def test_boilerplate_lines_go_and_are_counted():
    text = "To be\nPlease enable JavaScript.\nor not\nTerms of Use apply"
    assert clean(text, ["javascript", "Terms of use"])[:3] == ("To be\nor not", False, 2)


def test_contacts_are_scrubbed_only_if_wanted():
    text = "Ask a.b+c@mail.example.org or call +49 30 1234 5678, (030) 123-4567, 555-123-4567!"
    assert clean(text).text == text
    expected = "Ask [email] or call [phone], [phone], [phone]!"
    assert clean(text, scrub=True) == (expected, False, 0, 4)


@pytest.mark.parametrize(
    "text",
    ["1914-1918", "2021-11-03", "3.14159265", "page 123-456", "10,000,000", "1 000 000", "a@b",
     "192.168.100.200", "ISBN 978-3-16-148410-0", "act 3 scene 4 line 1234"],
)  # fmt: skip
def test_other_numbers_are_no_contacts(text):
    assert clean(text, scrub=True).text == text
