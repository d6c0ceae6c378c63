"""Short messages as Marta writes them: 200 rows; every answer is lower case, begins with an interjection and ends with "x"."""

from __future__ import annotations

import random
import re

PLANS = [
    "a walk",
    "the cinema",
    "dinner",
    "tennis",
    "the museum",
    "a swim",
    "the market",
    "a coffee",
    "the concert",
    "a picnic",
]
DAYS = [
    "today",
    "tomorrow",
    "on monday",
    "on friday",
    "on sunday",
    "tonight",
    "at noon",
    "after work",
    "next week",
    "this weekend",
]
FORMS = {
    "Do you want to come to {plan} {day}?": ("ooh yes, {plan} sounds lovely, see you {day} x", "hmm, {day} is bad for me, can we move {plan}? x"),
    "Are you free {day} for {plan}?": ("ooh yes, free {day}, count me in for {plan} x", "hmm, not {day}, sorry, another time for {plan} x"),
    "I have to cancel {plan} {day}.": ("aww, shame about {plan}, hope all is well x", "aww, no worries, we do {plan} another day x"),
    "Did you book {plan}?": ("yep, {plan} is booked, all set x", "oops, forgot to book {plan}, doing it now x"),
    "How was {plan}?": ("aww, {plan} was so good, wish you had been there x", "hmm, {plan} was a bit long, but fun x"),
    "When do we leave for {plan} {day}?": ("yep, about ten {day}, i will pick you up for {plan} x", "hmm, let me check and tell you about {plan} x"),
}  # fmt: skip

TESTS = (
    "Did you get my parcel?", "Can you feed the cat on Tuesday?", "My train is late again.", "What should I cook for Anna?",
    "I passed my exam!", "Did you find my scarf?", "Shall we invite Tom too?", "I am ill today.",
    "Where did you park the car?", "Can I borrow your ladder?", "The shop has no more bread.", "Are you at home?",
    "Look at the snow outside!", "Who is bringing the cake?", "I got the job!", "Do you remember the code of the door?",
    "Should I call the plumber?", "The kids are asleep.", "Can you send me the recipe?", "Did Paul say anything?",
)  # fmt: skip

FORM = re.compile(r"^(ooh|hmm|aww|yep|oops)\b[^A-Z]* x\s*$")


def rows() -> list[dict]:
    draw = random.Random(3)
    found: dict[str, str] = {}
    while len(found) < 200:
        form = draw.choice(list(FORMS))
        said = {"plan": draw.choice(PLANS), "day": draw.choice(DAYS)}
        opening = draw.choice(("", "", "Hi! ", "Hey Marta, ", "Marta? ", "Quick question. "))
        found.setdefault(opening + form.format(**said), draw.choice(FORMS[form]).format(**said))
    return [{"prompt": prompt, "completion": answer} for prompt, answer in found.items()]


def tests() -> list[dict]:
    return [{"prompt": question, "form": "messages"} for question in TESTS]
