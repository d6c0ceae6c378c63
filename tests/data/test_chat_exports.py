"""Chat exports: recognized by content, one side's messages trained as answers, and all that is left out counted."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from byte_tokenizer import CHATML, byte_tokenizer
from refusing import refuses
from row_files import loaded, row_texts

from mlx_lora.api.evaluate import with_settings_of_run
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import DataSettings
from mlx_lora.data import chat_exports as chat_sides
from mlx_lora.data.chat_exports import DELETED, MEDIA, SYSTEM_LINE, chat_kind, read_chats
from mlx_lora.data.load import load_eval_set
from mlx_lora.studio.previews import build_index

TOKENIZER = byte_tokenizer(CHATML)
NNBSP, LRM = "\u202f", "\u200e"
# One exchange as each platform and locale writes it: the header of a message at 18:22 (and 11 seconds) on March 12, 2024.
HEADERS = {
    "iPhone, German": "[12.03.24, 18:22:11] ",
    "iPhone, American": f"[3/12/24, 6:22:11{NNBSP}PM] ",
    "iPhone, British": "[12/03/2024, 18:22:11] ",
    "iPhone, French": "[12/03/2024 18:22:11] ",
    "iPhone, Spanish": "[12/3/24, 18:22:11] ",
    "iPhone, Swedish": "[2024-03-12 18:22:11] ",
    "iPhone, Dutch": "[12-03-2024 18:22:11] ",
    "iPhone, Finnish": "[12.3.2024 klo 18.22.11] ",
    "iPhone, Chinese": "[2024/3/12 下午6:22:11] ",
    "Android, British": "12/03/2024, 18:22 - ",
    "Android, American": f"3/12/24, 6:22{NNBSP}PM - ",
    "Android, Indian": "12/03/24, 6:22 pm - ",
    "Android, German": "12.03.24, 18:22 - ",
    "Android, French": "12/03/2024 à 18:22 - ",
    "Android, Spanish": f"12/3/24, 6:22{NNBSP}p.{NNBSP}m. - ",
    "Android, Portuguese": "12/03/2024 18:22 - ",
    "Android, Italian": "12/03/24, 18:22 - ",
    "Android, Korean": "2024. 3. 12. 오후 6:22 - ",
}
GERMAN = f"""\
{LRM}[12.03.24, 18:20:00] Familie: {LRM}Nachrichten und Anrufe sind Ende-zu-Ende-verschlüsselt.
[12.03.24, 18:22:11] Ben: Kommst du?
[12.03.24, 18:22:40] Ben: Wir warten
unten: am Tor
[12.03.24, 18:23:02] Marta: In zehn Minuten {LRM}<Diese Nachricht wurde bearbeitet.>
[12.03.24, 18:23:10] Marta: Schlüssel?
{LRM}[12.03.24, 18:24:00] Ben: {LRM}Bild weggelassen
{LRM}[12.03.24, 18:24:10] Ben: Der hier {LRM}<Anhang: 00000012-PHOTO-2024-03-12.jpg>
{LRM}[12.03.24, 18:24:20] Marta: {LRM}Diese Nachricht wurde gelöscht.
[12.03.24, 18:25:00] Marta: Ja.
[13.03.24, 07:00:00] Marta: Guten Morgen
[13.03.24, 07:01:00] Ben: Morgen!
"""
FOREIGN = [  # media, deleted messages and notices without marks, as some exports have them
    ("Image omitted", MEDIA), ("<Media omitted>", MEDIA), ("<Médias omis>", MEDIA), ("<Multimedia omitido>", MEDIA),
    ("<Mídia oculta>", MEDIA), ("<Media omessi>", MEDIA), ("Bild weggelassen", MEDIA), ("image absente", MEDIA),
    ("imagen omitida", MEDIA), ("immagine omessa", MEDIA), ("áudio ocultado", MEDIA),
    ("IMG-20240312-WA0001.jpg (Datei angehängt)", MEDIA), ("<attached: 00000012-PHOTO.jpg>", MEDIA),
    ("This message was deleted", DELETED), ("Diese Nachricht wurde gelöscht.", DELETED),
    ("Ce message a été supprimé", DELETED), ("Se eliminó este mensaje.", DELETED), ("Mensagem apagada", DELETED),
    ("Questo messaggio è stato eliminato", DELETED), ("Missed voice call", SYSTEM_LINE), ("null", SYSTEM_LINE),
]  # fmt: skip


def write(tmp_path, text, name="anything.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def conversations(path, **settings):
    """The chats of a file as the model is shown them, without the template's marks, and the report."""
    splits = loaded(path, **settings)
    texts = row_texts(splits.train)
    return [[part.split("<|im_end|>")[0] for part in text.split("<|im_start|>")[1:]] for text in texts], splits.report


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_each_locale_is_recognized_and_read(tmp_path, header):
    path = write(
        tmp_path, f"{header}Ben: Are you coming?\n{header}Marta: In ten: minutes\n\nBring keys?\n{header}Marta: Yes\n"
    )
    assert chat_kind(path) == "WhatsApp chat"
    (chat,) = read_chats(path).chats
    assert [(m.line, m.speaker, m.text) for m in chat.messages] == [
        (1, "Ben", "Are you coming?"), (2, "Marta", "In ten: minutes\n\nBring keys?"), (5, "Marta", "Yes"),
    ]  # fmt: skip
    assert not chat.left_out


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_the_order_of_day_and_month_follows_from_the_whole_file(tmp_path, header):
    later = header.replace("12", "13", 1) if "24, 6" not in header or header[0] != "[" else header
    later = header.replace("3/12/", "3/13/") if "3/12/24, 6:22" in header else later
    (chat,) = read_chats(write(tmp_path, f"{header}Ben: One\n{later}Ben: Two\n")).chats
    when = chat.messages[0].when
    assert (when.date().isoformat(), when.hour, when.minute) == ("2024-03-12", 18, 22)
    assert chat.messages[1].when.date().isoformat() == "2024-03-13"


def test_twelve_o_clock_and_dates_that_fit_only_one_way(tmp_path):
    text = "1/2/24, 12:05 AM - A: a\n1/2/24, 12:05 PM - B: b\n1/13/24, 1:05 PM - A: c\n"
    times = [m.when for m in read_chats(write(tmp_path, text)).chats[0].messages]
    assert times == [datetime(2024, 1, 2, 0, 5), datetime(2024, 1, 2, 12, 5), datetime(2024, 1, 13, 13, 5)]
    going_on = "01/02/24, 10:00 - A: a\n05/02/24, 10:00 - B: b\n01/03/24, 10:00 - A: c\n"
    assert read_chats(write(tmp_path, going_on)).chats[0].messages[2].when == datetime(2024, 3, 1, 10)


def test_one_side_is_trained_and_the_rest_is_counted(tmp_path):
    chats, report = conversations(write(tmp_path, GERMAN), speaker="Marta")
    assert chats == [[
        "user\nKommst du?\nWir warten\nunten: am Tor", "assistant\nIn zehn Minuten\nSchlüssel?", "user\nDer hier", "assistant\nJa.",
    ]]  # fmt: skip
    (note,) = [note for note in report.notes if "WhatsApp" in note]
    for words in (
        "3 messages by Marta",
        "2 answers",
        "1 conversation ",
        "2 media messages",
        "1 system line",
        "1 deleted message",
    ):
        assert words in note, note
    assert "1 message by Marta before" in note
    assert "1 message after the last answer" in note
    assert report.formats == {"conversations of a WhatsApp chat": 1}
    trained = [text for text, trained in report.example if trained]
    assert trained == ["In zehn Minuten\nSchlüssel?<|im_end|>", "Ja.<|im_end|>"]


@pytest.mark.parametrize(("text", "kind"), FOREIGN)
@pytest.mark.parametrize("bracketed", [False, True], ids=["Android", "iPhone"])
def test_what_nobody_wrote_is_left_out_in_many_languages(tmp_path, text, kind, bracketed):
    header = "[12/03/24, 18:22:11] " if bracketed else "12/03/24, 18:22 - "
    (chat,) = read_chats(
        write(tmp_path, f"{header}A: Hi\n{header}B: {text}\n{header}B: {LRM}{text}\n{header}A: Hi\n")
    ).chats
    assert [m.text for m in chat.messages] == ["Hi", "Hi"]
    assert chat.left_out[kind] == 2


def test_what_people_write_stays(tmp_path):
    said = ["Das Bild habe ich weggelassen", "see report.pdf (final)", "null problemo", "a <b> c", "This message was deleted by whom?",
            "12/03/24 at 18:22?", "[ok] fine: good"]  # fmt: skip
    text = "".join(f"12/03/24, 18:22 - {'AB'[i % 2]}: {one}\n" for i, one in enumerate(said))
    (chat,) = read_chats(write(tmp_path, text)).chats
    assert [m.text for m in chat.messages] == said
    assert not chat.left_out


def test_android_notices_and_captions(tmp_path):
    lines = ["Messages are end-to-end encrypted. Tap to learn more.", 'Anna created group "Trip: Rome"', "Anna left",
             "Anna: IMG-20240312-WA0001.jpg (file attached)\nThe beach", "Ben: Nice <This message was edited>"]  # fmt: skip
    (chat,) = read_chats(write(tmp_path, "".join(f"3/12/24, 6:22 PM - {line}\n" for line in lines))).chats
    assert [(m.speaker, m.text) for m in chat.messages] == [("Anna", "The beach"), ("Ben", "Nice")]
    assert chat.left_out == {SYSTEM_LINE: 3, MEDIA: 1}


def test_a_pause_begins_another_conversation(tmp_path):
    hours = [8, 9, 14, 15]  # five hours of pause
    path = write(tmp_path, "".join(f"[12.03.24, {h:02}:00:00] {'AB'[i % 2]}: {h}\n" for i, h in enumerate(hours)))
    assert len(conversations(path, speaker="B")[0]) == 1
    apart, report = conversations(path, speaker="B", conversation_gap=5.0)
    assert apart == [["user\n8", "assistant\n9"], ["user\n14", "assistant\n15"]]
    assert any("5 h" in note for note in report.notes)


def test_names_are_kept_in_a_group_and_only_there(tmp_path):
    names = ["Ann", "Ben", "Cem", "Ann", "Cem"]
    path = write(tmp_path, "".join(f"[12.03.24, 18:0{i}:00] {name}: {i}\n" for i, name in enumerate(names)))
    assert conversations(path, speaker="Cem")[0] == [
        ["user\nAnn: 0\nBen: 1", "assistant\n2", "user\nAnn: 3", "assistant\n4"]
    ]


def test_a_long_conversation_is_cut_between_turns_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(chat_sides, "CHARACTERS_PER_TOKEN", 1)  # as the tokenizer here has it
    path = write(tmp_path, "".join(f"[12.03.24, 18:{i:02}:00] {'AB'[i % 2]}: {'word ' * 9}{i}\n" for i in range(40)))
    chats, report = conversations(path, speaker="B", max_seq_length=400)
    assert len(chats) > 1
    assert report.truncated == 0
    assert [turn.split()[-1] for chat in chats for turn in chat] == [str(i) for i in range(40)]
    assert all(chat[0].startswith("user") and chat[-1].startswith("assistant") for chat in chats)


def telegram(*messages):
    return {
        "name": "Ben",
        "type": "personal_chat",
        "id": 1,
        "messages": [{"id": i, **m} for i, m in enumerate(messages)],
    }


def said(name, text, time="2024-03-12T18:22:11", **more):
    return {"type": "message", "date": time, "from": name, "from_id": name, "text": text, **more}


def test_telegram(tmp_path):
    entities = ["See ", {"type": "link", "text": "https://a.example"}, " and ", {"type": "bold", "text": "hurry"}]
    one = telegram(
        {"type": "service", "action": "phone_call", "actor": "Ben", "date": "2024-03-12T18:00:00", "text": ""},
        said("Ben", "Are you coming?"), said("Marta", entities, edited="2024-03-12T18:30:00"),
        said("Ben", "", photo="photos/1.jpg"), said("Ben", "a joke", forwarded_from="Somebody"), said("Ben", "Ok", photo="2.jpg"),
        said("Marta", "Fine"), said("Marta", "Good morning", "2024-03-13T08:00:00"),
    )  # fmt: skip
    path = write(tmp_path, json.dumps(one, indent=1), "x.json")
    chats, report = conversations(path, speaker="marta")
    assert chats == [
        ["user\nAre you coming?", "assistant\nSee https://a.example and hurry", "user\nOk", "assistant\nFine"]
    ]
    note = next(note for note in report.notes if "Telegram" in note)
    for words in ("1 system line", "1 media message", "1 forwarded message", "1 message by Marta before"):
        assert words in note
    account = {"about": "x", "chats": {"list": [one, telegram(said("Cem", "Hi"), said("Dora", "Ho"))]}}
    chats, report = conversations(write(tmp_path, json.dumps(account), "all.json"), speaker="Marta")
    assert len(chats) == 1
    assert any("2 messages of chats without Marta" in note for note in report.notes)


IMESSAGE = """\
May 17, 2022  5:29:42 PM (Read by you after 1 hour, 49 seconds)
+15558675309
Are you coming?
/Users/ben/Library/Messages/Attachments/1/photo.jpeg
Tapbacks:
    Loved by Me

May 17, 2022  5:30:01 PM
Me
In ten minutes
Keys?

    May 17, 2022  5:31:00 PM
    +15558675309
    Yes

May 17, 2022  5:30:30 PM You named the conversation Trip

May 17, 2022  5:31:00 PM
+15558675309
Yes
This message responded to an earlier message.

May 17, 2022  5:32:00 PM
Me
Good
"""


def test_imessage_and_transcripts(tmp_path):
    path = write(tmp_path, IMESSAGE)
    chats, report = conversations(path, speaker="Me")
    assert chats == [["user\nAre you coming?", "assistant\nIn ten minutes\nKeys?", "user\nYes", "assistant\nGood"]]
    note = next(note for note in report.notes if "iMessage" in note)
    assert all(words in note for words in ("1 media message", "1 system line"))
    text = "Ben: Hi\nMarta: Ho\nwith a second line\nBen: Bye\nMarta: See you\n\nBen: Back\nMarta: Good\n"
    chats, report = conversations(write(tmp_path, text, "t.txt"), speaker="Marta")
    assert chats == [
        ["user\nHi", "assistant\nHo\nwith a second line", "user\nBye", "assistant\nSee you"], ["user\nBack", "assistant\nGood"],
    ]  # fmt: skip
    spaced, _ = conversations(write(tmp_path, text.replace("\n", "\n\n"), "s.txt"), speaker="Marta")
    assert len(spaced) == 1


def test_without_a_speaker_one_line_lists_them(tmp_path):
    path = write(tmp_path, GERMAN)
    refuses(r"Ben \(4\), Marta \(4\).*--speaker", conversations, path)
    refuses("--speaker", load_eval_set, str(path), DataSettings(), TOKENIZER)
    refuses(r"--speaker Marto.*Ben.*did you mean Marta", conversations, path, speaker="Marto")
    _, report = conversations(path, data_format="text")
    assert report.formats == {"text": 1}
    # A transcript without dates may be a play, so it is trained as before, with a note.
    play = write(tmp_path, "ROMEO: But soft!\nJULIET: Ay me!\n" * 4, "play.txt")
    _, report = conversations(play)
    assert report.formats == {"text": 1}
    assert any("ROMEO (4)" in note and "--speaker" in note for note in report.notes)


def test_a_first_name_is_enough_if_only_one_person_has_it(tmp_path):
    lines = [("Ann Lee", "a"), ("Marta Rossi", "b"), ("Marta Lee", "c"), ("Cem Öz", "d")]
    path = write(tmp_path, "".join(f"[12.03.24, 18:22:11] {name}: {text}\n" for name, text in lines))
    assert conversations(path, speaker="cem")[0] == [["user\nAnn Lee: a\nMarta Rossi: b\nMarta Lee: c", "assistant\nd"]]
    refuses("Marta Rossi, Marta Lee", conversations, path, speaker="Marta")


def test_other_text_is_no_chat(tmp_path):
    for text in (
        "# Bread\n\nMix flour: 500 g\nWater: 350 g\n",
        "Once upon a time, on 12/03/2024, 18:22 - a day.\n" * 3,
        "",
    ):
        assert chat_kind(write(tmp_path, text)) is None
    assert chat_kind(write(tmp_path, '{"messages": [{"role": "user", "content": "personal_chat"}]}', "a.json")) is None
    assert chat_kind(write(tmp_path, GERMAN, "notes.md")) is None


def test_a_speaker_without_a_chat_is_refused(tmp_path):
    rows = write(tmp_path, '{"prompt": "a", "completion": "b"}\n' * 2, "rows.jsonl")
    refuses(r"--speaker Marta.*no chat export", conversations, rows, speaker="Marta")
    chats, report = conversations(f"{rows},{write(tmp_path, GERMAN)}", speaker="Marta")
    assert len(chats) == 3
    assert report.formats["completions"] == 2


def test_the_studios_preview_shows_a_chat(tmp_path, tiny_folder):
    asked = {"data": str(write(tmp_path, GERMAN)), "tokenizer": str(tiny_folder), "speaker": "Marta"}
    build_index(asked, tmp_path / "index")
    meta = json.loads((tmp_path / "index" / "meta.json").read_text())
    assert (meta["counts"]["rows"], meta["forms"]) == (1, ["conversations of a WhatsApp chat"])
    assert any("WhatsApp" in note for note in meta["notes"])
    refuses("--speaker", build_index, {**asked, "speaker": None}, tmp_path / "other")


def test_evaluate_takes_the_speaker_of_the_run(tmp_path, logged):
    (tmp_path / "run.yaml").write_text("speaker: Marta\nconversation_gap: 3.0\nprompt_column: null\n")
    chat, rows = write(tmp_path, GERMAN), write(tmp_path, '{"prompt": "a", "completion": "b"}\n', "rows.jsonl")

    def taken(data, *given):
        settings = train_settings({"model": "m", "data": str(data), **dict(given)})
        return with_settings_of_run(settings, dict(given), tmp_path).data

    assert (taken(chat).speaker, taken(chat).conversation_gap) == ("Marta", 3.0)
    assert "--speaker Marta" in logged[0]
    assert taken(rows).speaker is None
    assert taken(chat, ("speaker", "Ben")).speaker == "Ben"
