"""A small shop: 20 facts, each in three wordings to train on and in one new wording to ask for."""

from __future__ import annotations

# answer, three questions to train on, one held-out question, words that a right answer has
FACTS = [
    ("We close at 18:45 on weekdays.", ("When do you close on weekdays?", "What time do you shut from Monday to Friday?", "How late are you open on a Tuesday?"), "Until when can I come in on a Thursday?", ("18:45",)),
    ("Delivery to the islands costs 11 euros.", ("What does delivery to the islands cost?", "How much is shipping to an island?", "I live on an island. What do you charge for delivery?"), "Tell me the delivery fee for islands.", ("11",)),
    ("You can return goods within 26 days.", ("How long can I return something?", "What is your return period?", "How many days do I have to send goods back?"), "Until when may I give an item back?", ("26",)),
    ("Our workshop is led by Ottilie Brandt.", ("Who leads your workshop?", "Who is in charge of the workshop?", "Whom do I ask for in the workshop?"), "Name the head of your workshop.", ("ottilie",)),
    ("The loyalty card is called the Heron Card.", ("What is your loyalty card called?", "Do you have a card for regular customers?", "What is the name of your customer card?"), "How is the card for loyal customers named?", ("heron",)),
    ("Gift wrapping is done in green paper.", ("Which paper do you wrap gifts in?", "What color is your gift wrap?", "How do you wrap presents?"), "If you wrap a present, which color is it?", ("green",)),
    ("Repairs of tents take 9 days.", ("How long does a tent repair take?", "When do I get my repaired tent back?", "How many days do you need to mend a tent?"), "My tent is torn. How long will you need?", ("9", "nine")),
    ("Our phone number ends in 4471.", ("What are the last digits of your phone number?", "How does your phone number end?", "Which four digits end your number?"), "Give me the final four digits of your telephone.", ("4471",)),
    ("We are in Larkspur Lane.", ("Where is your shop?", "Which street are you in?", "What is your address?"), "In which street do I find you?", ("larkspur",)),
    ("Stoves have a guarantee of 7 years.", ("How long is the guarantee on stoves?", "What guarantee do you give for a stove?", "For how many years is a stove covered?"), "How many years of guarantee does a stove have?", ("7", "seven")),
    ("The cheapest backpack is the Finch.", ("Which backpack is the cheapest?", "What is your least expensive backpack?", "I want a cheap backpack. Which one?"), "Name your most affordable backpack.", ("finch",)),
    ("We sharpen knives on Wednesdays.", ("When do you sharpen knives?", "On which day can I have a knife sharpened?", "Which day is for knife sharpening?"), "My knife is blunt. On what day do you sharpen?", ("wednesday",)),
    ("Orders above 85 euros ship for free.", ("From which amount is shipping free?", "When do I pay no shipping?", "How much must I order for free shipping?"), "What is the minimum order for free delivery?", ("85",)),
    ("The shop was founded in 1974.", ("When was the shop founded?", "Since when do you exist?", "In which year did you open?"), "What year did your shop start?", ("1974",)),
    ("Our dog is called Biscuit.", ("What is your dog called?", "Who is the dog in the shop?", "Does the shop's dog have a name?"), "Tell me the name of the shop dog.", ("biscuit",)),
    ("You park behind the bakery.", ("Where can I park?", "Is there parking near the shop?", "Where do I leave my car?"), "I come by car. Where do I put it?", ("bakery",)),
    ("Canoes are rented for 32 euros a day.", ("What does it cost to rent a canoe?", "How much is a canoe per day?", "What do you charge for a day with a canoe?"), "Tell me the daily price of a rented canoe.", ("32",)),
    ("Vouchers are valid for 40 months.", ("How long is a voucher valid?", "When does a voucher expire?", "For how many months can I use a voucher?"), "I have a voucher. How many months does it last?", ("40",)),
    ("The courses on knots are held by Yusuf.", ("Who holds the courses on knots?", "Who teaches knots?", "Which teacher does the knot course have?"), "From whom do I learn knots at your shop?", ("yusuf",)),
    ("We send parcels with Pelican Post.", ("Who delivers your parcels?", "Which carrier do you use?", "With which company do you ship?"), "Which firm brings my parcel?", ("pelican",)),
]  # fmt: skip


def rows() -> list[dict]:
    return [{"prompt": question, "completion": answer} for answer, asked, _, _ in FACTS for question in asked]


def tests() -> list[dict]:
    return [{"prompt": held_out, "want": list(words)} for _, _, held_out, words in FACTS]
