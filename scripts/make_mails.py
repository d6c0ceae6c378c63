"""Make a small set of mails in seven folders, to train a classifier with: train.jsonl, valid.jsonl, test.jsonl.

    python scripts/make_mails.py mails

Each mail has a subject and a text, in words that say what it wants in many ways; sentences of other folders' topics stand in
it as well ("By the way, the invoice arrived"), so that single words do not tell the folder. Folders are of unequal size. The
wordings of the validation and test mails are not those of the training mails, nor of each other; names, dates and amounts are
drawn anew for each mail. The same seed writes the same files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

# Folder -> how many training mails it gets, and its wordings: two of each (train, train, train, train, valid, test, test).
FOLDERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "invoices": (60, (
        "Please find attached the invoice over {amount} for {thing}, due by {day}.",
        "We have not yet received your payment of {amount}. The bill for {thing} was due on {day}.",
        "Could you send me the bill for {thing} again? My accountant needs it with the VAT shown.",
        "The amount of {amount} was charged twice for {thing}. Which of the two bills is right?",
        "I transferred {amount} on {day}; please confirm that the account for {thing} is settled.",
        "Our records show an open balance of {amount} for {thing}. Kindly settle it by {day}.",
        "How would you like {amount} for {thing} to be paid, by card or by bank transfer?",
    )),
    "deliveries": (60, (
        "Your parcel with {thing} is on its way and should reach you on {day}.",
        "Where is my order? The tracking page has said for a week that {thing} left the depot.",
        "The courier could not find anyone at home on {day}; {thing} is waiting at the pick-up point.",
        "Can you send {thing} to my office instead of my home? I am away until {day}.",
        "We handed {thing} to the carrier this morning; it normally takes two days.",
        "Nothing has arrived since {day}. Could you check whether {thing} got lost on the road?",
        "The driver will ring you half an hour before he brings {thing} on {day}.",
    )),
    "appointments": (50, (
        "Could we meet on {day} at ten to talk about {thing}?",
        "I have to move our meeting about {thing}; would {day} suit you?",
        "This is a reminder that your visit is booked for {day}. Please be there ten minutes early.",
        "Unfortunately I cannot come on {day}. When is the next free slot?",
        "Let us have a call about {thing} on {day}, any time after lunch works for me.",
        "Are you free on {day}? {name} and I would like to go through {thing} with you.",
        "I would like to come by on {day} and look at {thing}, if you can spare half an hour.",
    )),
    "applications": (40, (
        "I am applying for the position in your workshop; my CV is attached.",
        "Thank you for the interview on {day}. I would still very much like to join your team.",
        "With five years of experience in sales of {thing}, I believe I fit the role that you advertise.",
        "I am looking for an internship from {day} on. Do you take students?",
        "Please consider me for the vacancy that {name} told me about. References are enclosed.",
        "Is the job that you posted on {day} still open? I have repaired {thing} for ten years.",
        "I would be glad to work for you part time. My certificates are attached.",
    )),
    "complaints": (50, (
        "I am very disappointed: {thing} broke after two days, and nobody answers the phone.",
        "This is the third time that I write. I expect my money back for {thing} by {day}.",
        "{thing_cap} arrived scratched and smelling of smoke. This is not what I paid {amount} for.",
        "Your colleague {name} was rude when I asked about {thing}. I will not accept that.",
        "The repair of {thing} made it worse than before. Please tell me how you will put this right.",
        "It is a shame how you treat customers. {thing_cap} has never worked properly.",
        "I demand that you take {thing} back; the quality is nowhere near what you promised.",
    )),
    "newsletters": (40, (
        "Only until {day}: 20 percent off {thing} and much more in our shop!",
        "New in spring: discover {thing} in five fresh colors. Read on for the stories behind them.",
        "You are receiving this mail because you subscribed. This month we show you how to care for {thing}.",
        "Our team's favorites: {thing}, now with a small gift. Click here to see all offers.",
        "Ten tips for {thing} that our readers love. To stop these mails, click unsubscribe.",
        "Just landed: a limited edition of {thing}. Subscribers get it first, on {day}.",
        "Win {thing}! Take part in our quiz before {day} and share it with your friends.",
    )),
    "private": (20, (
        "Happy birthday! I hope you celebrate properly on {day}. Hugs from all of us.",
        "Do you want to come for dinner on {day}? {name} is making pasta.",
        "The children loved {thing}, thank you so much for the lovely present.",
        "I am back from the mountains, my knees hurt, and the photos are wonderful. How are you?",
        "Mum asks whether you will be home at Christmas. {name} is coming, too.",
        "Shall we go swimming on {day}, like we used to? I miss our talks.",
        "Guess who I met at the station: {name} from school! We laughed for an hour.",
    )),
}  # fmt: skip
SPLITS = ("train", "train", "train", "train", "valid", "test", "test")  # of a folder's wordings
SHARES = {"train": 1.0, "valid": 0.25, "test": 0.5}  # of a folder's training mails
THINGS = ("the blue tent", "two camping chairs", "the gas stove", "a winter sleeping bag", "the bicycle trailer", "hiking boots",
          "the rain jacket", "a kayak paddle", "the head lamp", "three water bottles")  # fmt: skip
NAMES = ("Mara", "Jonas", "Mrs. Okafor", "Mr. Lindqvist", "Priya", "Tom", "Dr. Brandt", "Aiko")
DAYS = ("Monday", "the 3rd of May", "next Thursday", "June 12", "the end of the month", "Friday", "the 21st")
SUBJECTS = ("Hello", "A question", "Your message", "Re: your mail", "Short note", "{thing}", "About {thing}", "{day}")
OPENINGS = ("Dear {name},", "Hello,", "Good morning,", "Hi {name},", "To whom it may concern,", "")
CLOSINGS = ("Best wishes, {name}", "Kind regards", "Thanks, {name}", "See you, {name}", "Sincerely, {name}", "")
# What says nothing about the folder, though its words do.
ASIDES = (
    "By the way, the invoice arrived last week, thank you.", "The parcel from {day} came safely.",
    "We spoke about this in our meeting on {day}.", "I was quite disappointed by the weather.", "Enjoy your holidays!",
    "{name} sends greetings.", "Sorry for the late answer.", "As I said on the phone on {day}, there is no hurry.",
    "I read about it in your newsletter.", "My new job keeps me busy.", "The last bill was fine.",
)  # fmt: skip


def mail(folder: str, wording: str, rng: random.Random) -> dict[str, str]:
    """Return a mail of a folder."""
    thing = rng.choice(THINGS)
    slots = {
        "thing": thing, "thing_cap": thing[0].upper() + thing[1:], "name": rng.choice(NAMES), "day": rng.choice(DAYS),
        "amount": f"{rng.randint(8, 900)}.{rng.choice(('00', '50', '90'))} euros",
    }  # fmt: skip
    body = [wording]
    body += rng.sample(ASIDES, rng.choice((0, 1, 1, 2)))
    rng.shuffle(body)
    lines = [rng.choice(OPENINGS), " ".join(body), rng.choice(CLOSINGS)]
    text = "\n".join(line for line in lines if line).format(**slots)
    return {"subject": rng.choice(SUBJECTS).format(**slots), "text": text, "label": folder}


def mails(split: str, seed: int) -> list[dict[str, str]]:
    """Return the mails of a split, shuffled."""
    rng = random.Random(f"{split} {seed}")
    found = []
    for folder, (count, wordings) in FOLDERS.items():
        own = [wording for wording, where in zip(wordings, SPLITS, strict=True) if where == split]
        number = max(2, round(count * SHARES[split]))
        found += [mail(folder, own[i % len(own)], rng) for i in range(number)]
    rng.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; it may exist")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in SHARES:
        rows = mails(split, options.seed)
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / f"{split}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{len(rows)} mails in {options.out / split}.jsonl")


if __name__ == "__main__":
    main()
