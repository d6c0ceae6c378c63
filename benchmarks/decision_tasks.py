"""Make a data set whose texts each answer several typed questions: train, valid, test and pool, as CSV or JSONL files.

    python benchmarks/decision_tasks.py OUT --task mails --seed 0 --rows 300

A text joins sentences, each drawn for the answer to one question, with others that say nothing about any. Of the wordings of
an answer, half are for training, a quarter come in the pool as well, and a quarter only in the validation and test files, which
are drawn alike: half of their sentences are in training wordings. Six answers of a hundred are wrong, in all files, so nobody
is right more often than in 94 of a hundred; a tenth of the training answers is missing. The same seed writes the same files.

In CSV files the labels of one cell stand with ";" between them, ";" alone says that no label holds, and an empty cell that the
answer is not known, as a number that the text does not give. JSONL files have lists, and null where nothing is known.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

Answer = str | int | float | list[str] | None

# Value -> (how often it comes, its wordings: four of each GROUPS).
Wordings = Mapping[str, tuple[float, tuple[str, ...]]]


@dataclass(frozen=True)
class Question:
    """What is asked of a text: its column, its kind, and how answers are said."""

    name: str
    kind: str  # choice, yes/no, ordered, several or number
    wordings: Wordings
    unsaid: str = ""  # the value that a third of its texts say with no sentence
    by: Mapping[str, tuple[float, ...]] | None = None  # an earlier answer -> shares of the values


@dataclass(frozen=True)
class Task:
    """Questions, sentences that answer none of them, and what is drawn into the gaps of all sentences."""

    questions: tuple[Question, ...]
    asides: tuple[str, ...]
    slots: Mapping[str, tuple[str, ...]]


GROUPS = ("train", "pool", "train", "new")  # of the first, second, third, fourth wording, and so on
# Split -> how often a sentence is in a wording of each group.
MIXTURES: dict[str, dict[str, float]] = {
    "train": {"train": 1.0},
    "valid": {"train": 0.5, "pool": 0.25, "new": 0.25},
    "test": {"train": 0.5, "pool": 0.25, "new": 0.25},
    "pool": {"train": 0.5, "pool": 0.5},
}
SIZES = {"train": 300, "valid": 200, "test": 1000, "pool": 1000}
WRONG, MISSING = 0.06, 0.1
WORDS = (15, 45)
TWICE = {"choice": 0.6, "yes/no": 0.3, "ordered": 0.3}  # how often two sentences give an answer
HOW_MANY = (0.35, 0.35, 0.2, 0.1)  # labels of a question with several: none, one, two, three
NAMES = ("Mara", "Jonas", "Mrs. Okafor", "Mr. Lindqvist", "Priya", "Tom", "Dr. Brandt", "Aiko", "Elif", "Mr. Novak")
DAYS = ("Monday", "the 3rd of May", "Thursday", "June 12", "the weekend", "Friday", "the 21st", "Tuesday evening")

MAILS = Task(
    (
        Question("folder", "choice", {
            "billing": (0.26, (
                "The invoice for {thing} still lacks the VAT number.",
                "My card was charged twice for {thing}.",
                "Please confirm that my transfer for {thing} reached your account.",
                "I got a payment reminder for {thing}, though I settled it on {day}.",
                "Could you send me the bill for {thing} again?",
                "The sum you debited for {thing} does not match the price on your page.",
                "May I pay for {thing} in three installments?",
                "Which bank details should I use to pay for {thing}?",
                "Your receipt for {thing} names the wrong buyer.",
                "PayPal says that the money for {thing} is on hold.",
                "I need a credit note for {thing} in our books.",
                "The statement of {day} lists {thing} as unpaid.",
            )),
            "delivery": (0.22, (
                "Where is my parcel with {thing}?",
                "The tracking page has not moved since {day}, and {thing} is still at the depot.",
                "The courier left {thing} with a neighbor whom I do not know.",
                "Please send {thing} to my office, not to my home.",
                "When will {thing} be shipped?",
                "Nobody was in on {day}, so the driver took {thing} away again.",
                "{thing_cap} has been on the road for two weeks now.",
                "I have moved; can {thing} still go to my new address?",
                "The carrier writes that {thing} cannot be handed over.",
                "Only one of two boxes came; {thing} was not inside.",
                "Can I fetch {thing} from a pick-up point on {day}?",
                "My doorbell is broken, so the postman should ring me when he brings {thing}.",
            )),
            "returns": (0.17, (
                "I would like to send {thing} back; how do I get a label?",
                "{thing_cap} is too small; can I swap it for the next size?",
                "I posted {thing} back to you on {day}; has it arrived?",
                "Is there still time to give back {thing}?",
                "I changed my mind about {thing} and do not want to keep it.",
                "The return form does not accept {thing}.",
                "Please take back {thing}; I ordered the wrong color.",
                "Who pays the postage when {thing} goes back to the shop?",
                "I want another model instead of {thing}.",
                "May I hand in {thing} at your store rather than mail it?",
                "I withdraw from the purchase of {thing}.",
                "The box of {thing} is open; do you still accept it?",
            )),
            "repairs": (0.13, (
                "The zip of {thing} tore after two trips.",
                "Do you mend {thing}, or do you know someone who does?",
                "I need a spare part for {thing}.",
                "{thing_cap} stopped working on {day}.",
                "A screw fell out of {thing}; can I order just that?",
                "Is the warranty of {thing} still valid?",
                "{thing_cap} has a crack along the seam.",
                "Your workshop has had {thing} since {day}; is it fixed?",
                "Something rattles inside {thing} when I shake it.",
                "{thing_cap} leaks; can it be sealed again?",
                "How do I replace the worn strap of {thing}?",
                "What would it take to get {thing} going again?",
            )),
            "products": (0.11, (
                "Does {thing} come in green?",
                "How heavy is {thing}?",
                "Is {thing} suitable for winter?",
                "Will you have {thing} in stock again soon?",
                "Which size of {thing} fits somebody who is tall?",
                "What is the difference between {thing} and last year's model?",
                "Can {thing} be washed in the machine?",
                "What material is {thing} made of?",
                "Would you advise {thing} for a beginner?",
                "Does {thing} fit into hand luggage?",
                "I wonder whether {thing} stands up to heavy rain.",
                "Are the measures of {thing} on your page with or without the lid?",
            )),
            "account": (0.07, (
                "I cannot log in to the shop any more.",
                "Please delete my profile and all my data.",
                "The link to reset my password does not work.",
                "How do I change the mail address of my customer account?",
                "Somebody seems to use my login.",
                "I no longer want your newsletter in my inbox.",
                "The page says that my user name is taken.",
                "I never got the code to confirm my registration.",
                "Please merge my two customer numbers.",
                "Your site locks me out after one try.",
                "Which data about me do you store?",
                "My name is misspelled in the settings, and I cannot edit it.",
            )),
            "jobs": (0.04, (
                "I apply for the position in your store; my CV is attached.",
                "Do you take interns from {day} on?",
                "Is the vacancy in the workshop still open?",
                "Thank you for the interview on {day}.",
                "I would be glad to work for you part time.",
                "{name} told me that you are hiring.",
                "My references and certificates are enclosed.",
                "What do you pay a beginner in sales?",
                "I have repaired tents for ten years and want to join your team.",
                "I am a student and look for a summer job.",
                "When will you decide about the candidates?",
                "Could I show you my skills on a trial day?",
            )),
        }),
        Question("urgent", "yes/no", {
            "yes": (0.35, (
                "I need an answer before noon.",
                "We leave tomorrow morning, so please hurry.",
                "This cannot wait until next week.",
                "It has to be settled today.",
                "Please call me back within the hour.",
                "Time is very short: our trip starts in two days.",
                "The deadline is tonight.",
                "Kindly treat this first.",
                "Every hour counts here.",
                "By tomorrow it will be too late.",
                "I am waiting by the phone.",
                "Please reply at once.",
            )),
            "no": (0.65, (
                "There is no hurry at all.",
                "An answer next month is early enough.",
                "Take your time.",
                "We only leave in the autumn, so it can wait.",
                "Whenever you find a quiet hour will do.",
                "It does not have to be settled this week.",
                "Please treat the others first.",
                "I am away until next month anyway.",
                "No need to call me back today.",
                "The deadline is far off.",
                "Some time this season is fine.",
                "A reply can come later.",
            )),
        }, unsaid="no"),
        Question("mood", "ordered", {
            "1": (0.12, (
                "I am furious.",
                "This is an outrage, and you will hear from my lawyer.",
                "I have never been treated so badly.",
                "You should be ashamed of yourselves.",
                "What a disgrace of a shop!",
                "Never again will I buy here.",
                "I am done with you people.",
                "This is beyond belief and makes me sick.",
                "I am boiling with rage.",
                "You are the worst shop I know.",
                "I will warn everybody about you.",
                "It is a scandal, plain and simple.",
            )),
            "2": (0.22, (
                "I am a bit disappointed.",
                "That is not quite what I expected of you.",
                "It is annoying, to be honest.",
                "I had hoped for better.",
                "This is getting tiresome.",
                "Not great, I must say.",
                "I am not happy with how this goes.",
                "It bothers me somewhat.",
                "That leaves a poor impression.",
                "I find it a pity.",
                "My patience is wearing thin.",
                "You used to do this better.",
            )),
            "3": (0.32, (
                "I write for the sake of good order.",
                "Just so that you know.",
                "This is merely a question.",
                "Please note it in your files.",
                "I simply report it.",
                "That is all for now.",
                "I have no opinion about it.",
                "It is neither good nor bad.",
                "I only pass this on.",
                "Let me know what you think.",
                "Here are the facts.",
                "So much for the matter.",
            )),
            "4": (0.22, (
                "Thanks, you are always helpful.",
                "So far I am pleased with your shop.",
                "It is nice to deal with you.",
                "I am sure that you will sort it out.",
                "Your advice was good last time.",
                "I like ordering here.",
                "Your team was kind on the phone.",
                "All in all I am content.",
                "Things went well until now.",
                "I appreciate your work.",
                "You usually get it right, which I value.",
                "That was friendly of you.",
            )),
            "5": (0.12, (
                "You are simply wonderful!",
                "I am over the moon!",
                "The best shop in the world, no doubt!",
                "I could hug you all!",
                "I have never had such brilliant service!",
                "I am thrilled beyond words!",
                "What a fantastic team you are!",
                "You made my whole year!",
                "Absolutely perfect, ten out of ten!",
                "I am your biggest fan!",
                "I love everything you do!",
                "Marvelous, I keep smiling!",
            )),
        }),
        Question("tags", "several", {
            "abroad": (0.18, (
                "I live in Norway.",
                "The customs office asks for papers.",
                "Please write back in English; I am in Lisbon.",
                "We are outside the EU.",
                "My address is in Switzerland.",
                "It crosses a border.",
                "Greetings from Canada.",
                "Import tax was added here.",
                "We read your mail in Tokyo.",
                "There is no branch in my country.",
                "It goes overseas.",
                "I order from Iceland.",
            )),
            "business": (0.2, (
                "We are a company of nine.",
                "It is for our office.",
                "I buy for a school.",
                "Our firm has a contract with you.",
                "We resell your goods.",
                "I write for the purchasing department.",
                "Our hotel orders here each year.",
                "My boss asked me to write.",
                "We need it for the staff.",
                "Our club has thirty members.",
                "Please use the trade terms.",
                "I run a small guest house.",
            )),
            "gift": (0.17, (
                "It is a present for my son.",
                "Please wrap it nicely.",
                "It should be a surprise.",
                "It is for {name}'s birthday.",
                "A card with greetings would be lovely.",
                "My parents shall get it for Christmas.",
                "We give it to newlyweds.",
                "The price should not be in the box.",
                "It goes under the tree.",
                "Grandma will unpack it.",
                "It was meant to please my niece.",
                "Do you have ribbon and paper?",
            )),
            "loyal": (0.17, (
                "I have bought here for years.",
                "This is my twentieth order.",
                "I am a member of your club.",
                "You have known me since your opening.",
                "I have a customer card.",
                "We come back every season.",
                "My points should be enough.",
                "As a regular I know your rules.",
                "Even my father bought from you.",
                "I have been with you since 2009.",
                "You are my usual shop.",
                "Once again I turn to you.",
            )),
            "photo": (0.14, (
                "A picture is attached.",
                "See the photo below.",
                "I took two snapshots.",
                "The attached image shows it.",
                "I can send you a video.",
                "Here is a screenshot.",
                "I filmed it for you.",
                "You see it well in the pictures.",
                "Look at the scan.",
                "The JPG is in the annex.",
                "My camera caught it.",
                "I made a close-up.",
            )),
            "voucher": (0.14, (
                "I have a voucher.",
                "The code SPRING was refused.",
                "My coupon runs out soon.",
                "Does the discount apply?",
                "I won a gift card.",
                "Ten percent were promised to me.",
                "The rebate is missing.",
                "Please take off the reduction.",
                "Your flyer offers it for less.",
                "I would like the sale price.",
                "A promo number is on my mail.",
                "Is there a bonus for new buyers?",
            )),
        }),
        Question("amount", "number", {
            "": (0.7, ()),
            "given": (0.3, (
                "The total was {amount}.",
                "It is about {amount}.",
                "I paid {amount}.",
                "We speak of {amount}.",
                "{amount} in all.",
                "That makes {amount}.",
                "It cost me {amount}.",
                "The price was {amount}.",
                "{amount} is what it says.",
                "My bank shows {amount}.",
                "Worth {amount}, by the way.",
                "I remember {amount}.",
            )),
        }),
    ),
    (
        "My order number is {number}.", "I read about it in your newsletter.", "The last invoice was fine, thank you.",
        "My other parcel came safely on {day}.", "We spoke on the phone on {day}.", "{name} sends greetings.",
        "I have returned nothing so far.", "Your page about repairs did not help.", "I logged in to look it up.",
        "It was delivered in {number2} days back then.", "This is not about the payment.", "The size and color are right.",
        "I asked {name} from your workshop already.", "My customer number is {number}.", "It rained all week here.",
    ),
    {
        "thing": ("the blue tent", "the camping chair", "the gas stove", "the winter sleeping bag", "the bicycle trailer",
                  "the rain jacket", "the kayak paddle", "the head lamp", "the water bottle", "the backpack"),
    },
)  # fmt: skip

REVIEWS = Task(
    (
        Question("topic", "choice", {
            "food": (0.28, (
                "Breakfast was served until ten, with eggs and local cheese.",
                "For dinner we had the fish and a glass of wine.",
                "The menu changes every {day2}.",
                "The chef came out and told us about his soup.",
                "They bake their own bread in the kitchen.",
                "There were vegan dishes next to the meat.",
                "The buffet had fruit, cereals and three kinds of juice.",
                "At the bar they mixed drinks with herbs from the garden.",
                "Coffee came in large pots to our table.",
                "We ate on the terrace, mostly pasta and salad.",
                "They cook with little salt and a lot of garlic.",
                "Dessert was a cake with plums.",
            )),
            "room": (0.26, (
                "The bed was two meters wide, with four pillows.",
                "Our window looked onto the yard.",
                "The bathroom had a tub and no shower.",
                "We slept on the third floor in a double room.",
                "There was a desk, a lamp and a wardrobe.",
                "The heating is set by a dial next to the door.",
                "From the balcony one sees the roofs.",
                "The mattress was of the firm sort.",
                "Our suite had carpets and a sofa.",
                "Towels lay on a chair beside the sink.",
                "The walls are painted yellow, and the curtains reach the floor.",
                "At night one hears the lift through the ceiling.",
            )),
            "staff": (0.2, (
                "The receptionist explained the house to us.",
                "A porter called {name} took the bags upstairs.",
                "The manager spoke with us on {day}.",
                "At the desk they speak four languages.",
                "The cleaners came each morning at nine.",
                "The waiter was new and asked {name} for help.",
                "Our host met us at the gate.",
                "The lady at the front desk looked up the trains.",
                "Somebody from the house was on duty all night.",
                "The concierge booked the theater for us.",
                "Those who work there wear green.",
                "Two trainees checked us in.",
            )),
            "place": (0.15, (
                "The house stands ten minutes from the station.",
                "The beach is across the street.",
                "It lies at the edge of the old town.",
                "The next bus stop is around the corner.",
                "There is a park with a lake behind the building.",
                "One walks uphill to reach the center.",
                "The airport is half an hour away by train.",
                "Shops and museums are within a short walk.",
                "The village has one road and a church.",
                "It is next to the fair grounds.",
                "We parked by the river and crossed the bridge.",
                "The area is full of offices.",
            )),
            "price": (0.11, (
                "A night cost as much as a flight home.",
                "We paid with a card on {day}.",
                "The rate went up after we had booked.",
                "They charge extra for parking.",
                "The city tax was added to the bill.",
                "We found the offer in a sale.",
                "The deposit came back to our account.",
                "For the same money one gets a flat.",
                "The minibar was on the invoice.",
                "Children under six stay for free.",
                "It was cheaper by phone than online.",
                "The fee for a late cancellation is one night.",
            )),
        }),
        Question("stars", "ordered", {
            "1": (0.12, (
                "It was a nightmare from start to end.",
                "Horrible, I want my money back.",
                "I have never seen anything as bad.",
                "We left after one night in disgust.",
                "A total disaster.",
                "Shame on this house.",
                "It could not have been worse.",
                "I felt cheated and miserable.",
                "Avoid the sort of misery we had.",
                "Utterly dreadful.",
                "This ruined our holiday.",
                "It should be shut down.",
            )),
            "2": (0.18, (
                "We had expected more.",
                "Rather poor on the whole.",
                "It fell short of what the pictures showed.",
                "Below average, I am afraid.",
                "It was a letdown in several ways.",
                "Too many small things went wrong.",
                "I was not really satisfied.",
                "There is a lot to improve.",
                "It has seen better days.",
                "We were somewhat let down.",
                "Mediocre at best.",
                "It did not feel right.",
            )),
            "3": (0.25, (
                "It was okay, no more and no less.",
                "Average, with good and bad sides.",
                "Nothing special, nothing terrible.",
                "One can live with it.",
                "It does its job.",
                "We were neither glad nor cross.",
                "Fair enough.",
                "A standard stay like many others.",
                "It was so-so.",
                "Some of it was fine, some was not.",
                "Decent, but forgettable.",
                "I am of two minds.",
            )),
            "4": (0.27, (
                "We liked it a lot.",
                "A good stay with tiny flaws.",
                "I was pleased.",
                "Better than most.",
                "Very nice, almost perfect.",
                "We felt at ease.",
                "Well done on the whole.",
                "It was a pleasant surprise.",
                "I slept and lived well.",
                "Good, with a little room above.",
                "We enjoyed our days.",
                "It suits me well.",
            )),
            "5": (0.18, (
                "It was heaven on earth!",
                "Flawless in every way!",
                "The best stay of our lives!",
                "I was blown away!",
                "Pure magic, I had tears in my eyes!",
                "Ten out of ten!",
                "Outstanding, we did not want to leave!",
                "A dream come true!",
                "I cannot praise it enough!",
                "Superb from the first minute!",
                "Simply breathtaking!",
                "We are in love with it!",
            )),
        }),
        Question("recommends", "yes/no", {
            "yes": (0.55, (
                "I tell all my friends to go there.",
                "Book it while you can.",
                "You should try it yourself.",
                "I have sent my sister there already.",
                "Go, and thank me later.",
                "We would choose it again.",
                "Others will be in good hands.",
                "I can advise it to anybody.",
                "It belongs on your list.",
                "My colleagues got the address from me.",
                "A clear yes from me.",
                "We have reserved for next year.",
            )),
            "no": (0.45, (
                "I would not tell my friends to go there.",
                "Look for something else.",
                "You should spare yourself the trip.",
                "I told my sister to book another house.",
                "Go elsewhere.",
                "We would not choose it again.",
                "Others should think twice.",
                "I can advise it to nobody.",
                "Strike it from your list.",
                "My colleagues will not get the address.",
                "A clear no from me.",
                "We have cancelled for next year.",
            )),
        }, by={"1": (0.15, 0.85), "2": (0.3, 0.7), "3": (0.5, 0.5), "4": (0.7, 0.3), "5": (0.85, 0.15)}),
        Question("tags", "several", {
            "children": (0.24, (
                "Our kids are three and five.",
                "We came as a family.",
                "The baby slept in a cot.",
                "My daughter is at school.",
                "The twins were with us.",
                "We need a high chair.",
                "Our boys played outside.",
                "The little ones were tired.",
                "We travel with a stroller.",
                "Our teenager had his own bed.",
                "The grandchildren came too.",
                "Diapers fill our bags.",
            )),
            "dog": (0.18, (
                "Our dog was with us.",
                "Pets may come.",
                "The puppy is six months old.",
                "My terrier sleeps on a blanket.",
                "We walk him twice a day.",
                "Leash and bowl were packed.",
                "Bello stayed by my side.",
                "He barks at strangers.",
                "My poodle is old.",
                "Four paws came along.",
                "We brought a kennel.",
                "Our hound hates lifts.",
            )),
            "work": (0.22, (
                "I was there on business.",
                "I had meetings all day.",
                "My firm paid for it.",
                "It was for a trade fair.",
                "I gave a talk in town.",
                "A conference brought me here.",
                "I worked on my laptop.",
                "A client lives nearby.",
                "My boss chose it.",
                "I trained a team here.",
                "I attended a workshop.",
                "An audit took three days.",
            )),
            "couple": (0.2, (
                "My wife was with me.",
                "It was our anniversary.",
                "We were on our honeymoon.",
                "My husband snores.",
                "My partner chose the dates.",
                "Just the two of us.",
                "My girlfriend drove.",
                "I proposed to her there.",
                "We had time for each other.",
                "Our silver wedding was due.",
                "My fiancé planned it.",
                "A romantic break, as lovers do.",
            )),
            "car": (0.16, (
                "We came by car.",
                "The garage is narrow.",
                "We drove for six hours.",
                "Our camper stood outside.",
                "There was a charger for our electric one.",
                "The motorway was jammed.",
                "We had hired a van.",
                "I filled the tank on arrival.",
                "My tires are new.",
                "The road trip took a week.",
                "I do not like to drive.",
                "The trunk was full.",
            )),
        }),
    ),
    (
        "We did not try the breakfast.", "About the price I say nothing.", "It was our second visit since {day}.",
        "The staff I hardly saw.", "The weather was mild.", "I stayed {number2} nights.", "My room number was {number3}.",
        "We only came to sleep there.", "The town itself is another story.", "{name} wrote about the food already.",
        "We arrived on {day}.", "Others can judge the beds.", "I skip the question of money.", "The station I know from before.",
    ),
    {"day2": ("week", "month", "day", "season")},
)  # fmt: skip

TICKETS = Task(
    (
        Question("team", "choice", {
            "network": (0.24, (
                "The wireless signal drops in the meeting room.",
                "I cannot reach the file share from home.",
                "The VPN asks for a new certificate.",
                "Pages load slowly in the whole corridor.",
                "No cable in office {number3} gives a connection.",
                "The guest access does not hand out an address.",
                "Ping times to the other site are above a second.",
                "The firewall seems to block our partner's site.",
                "My tunnel to the data center closes every hour.",
                "A switch in the basement blinks red.",
                "We are offline on the second floor.",
                "The router forgets its settings.",
            )),
            "hardware": (0.22, (
                "My machine does not start any more.",
                "The fan is loud and the case gets hot.",
                "The battery lasts twenty minutes.",
                "A hinge is broken.",
                "It shuts down when I move it.",
                "I spilled tea over my device.",
                "The charger gives no power.",
                "A port is bent, and nothing fits in.",
                "The disk makes clicking noises.",
                "Two keys came off.",
                "It beeps three times and stays dark.",
                "I was given one with a cracked case.",
            )),
            "accounts": (0.19, (
                "My password has run out.",
                "A new colleague starts on {day} and needs a login.",
                "I am locked out after three tries.",
                "Please give {name} rights to the project folder.",
                "The second factor does not reach me.",
                "My user name still has my old surname.",
                "{name} has left; please close the access.",
                "I was removed from the group by mistake.",
                "Single sign-on sends me in circles.",
                "I need the role of an editor.",
                "The token on my key ring is lost.",
                "Permission is denied when I open the archive.",
            )),
            "software": (0.16, (
                "The spreadsheet program crashes on start.",
                "I need a license for the drawing tool.",
                "The update failed halfway.",
                "The PDF reader shows empty pages.",
                "Macros are blocked since {day}.",
                "Please install the new version for me.",
                "The calendar app shows the wrong time zone.",
                "An add-in is missing from the menu.",
                "The browser forgets my tabs.",
                "The accounting client reports error {number3}.",
                "My editor freezes when I save.",
                "I would like to remove an old program.",
            )),
            "mail": (0.12, (
                "My inbox is full.",
                "Mails to {name} come back.",
                "I get a lot of spam.",
                "The shared mailbox has vanished.",
                "My signature shows the old logo.",
                "Attachments are stripped from what I send.",
                "The out-of-office reply stays on.",
                "Messages arrive hours late.",
                "I cannot add a distribution list.",
                "A newsletter landed in quarantine.",
                "Please restore what I deleted from my drafts.",
                "Outgoing post sits in the outbox.",
            )),
            "printing": (0.07, (
                "The copier on our floor jams.",
                "Toner is empty.",
                "Pages come out with stripes.",
                "My jobs wait in the queue.",
                "The scanner sends nothing to my folder.",
                "Only the first page is on paper.",
                "It asks for a badge that I do not have.",
                "Colors look green on paper.",
                "Tray two is not found.",
                "Staples are used up.",
                "Both sides come out, though I want one.",
                "The plotter cuts the sheet too early.",
            )),
        }),
        Question("priority", "ordered", {
            "1": (0.14, (
                "The whole company stands still.",
                "Nobody here can work.",
                "Production is down, and we lose money.",
                "All sites are affected.",
                "Customers cannot order at all.",
                "The emergency line is dead.",
                "Everything has stopped.",
                "The plant is idle because of it.",
                "Data of all clients is at risk.",
                "No department can go on.",
                "We have had to send everyone home.",
                "The core system is gone.",
            )),
            "2": (0.26, (
                "My whole team is held up.",
                "I cannot do my work.",
                "A deadline is in danger.",
                "Ten of us are waiting.",
                "There is no way around it.",
                "Our department is slowed down badly.",
                "The month-end closing depends on it.",
                "Several desks have the same.",
                "It blocks a customer's project.",
                "Half of us sit and wait.",
                "I am stuck until it is solved.",
                "A key task is on hold.",
            )),
            "3": (0.36, (
                "I can work around it.",
                "It only concerns me.",
                "It costs me a few minutes a day.",
                "There is a spare that I use.",
                "It comes and goes.",
                "I manage for the time being.",
                "It slows me a little.",
                "A second try mostly helps.",
                "For now I borrow from a colleague.",
                "It is a hindrance, not a stop.",
                "One of my tasks takes longer.",
                "I have found another way meanwhile.",
            )),
            "4": (0.24, (
                "It is just cosmetic.",
                "This is only a wish.",
                "It does not disturb anybody.",
                "Merely for your list.",
                "I am simply curious.",
                "It would be nice to have.",
                "Nothing depends on it.",
                "It is a matter of taste.",
                "You may forget it if you are busy.",
                "A detail that I noticed.",
                "It is a small idea for some day.",
                "No harm is done by it.",
            )),
        }),
        Question("escalate", "yes/no", {
            "yes": (0.3, (
                "This is my third ticket about it.",
                "My manager wants to be told.",
                "You closed it before, and it is back.",
                "I ask for someone above you.",
                "Your last fix did not hold.",
                "The board has heard of it.",
                "I will go to your superior.",
                "Weeks have gone by without a reply.",
                "The works council is involved.",
                "I have been sent from one to the next.",
                "Please pass it on to your lead.",
                "The contract promised a solution by now.",
            )),
            "no": (0.7, (
                "This is my first ticket about it.",
                "My manager does not need to be told.",
                "It has not come up before.",
                "Anyone of you can take it.",
                "Your last fix was good.",
                "I have only just noticed it.",
                "I leave it to you.",
                "You always reply soon.",
                "Nobody else has heard of it.",
                "The usual way is fine.",
                "There is no need to pass it on.",
                "I trust that you will see to it.",
            )),
        }, unsaid="no"),
        Question("parts", "several", {
            "laptop": (0.22, (
                "It is about my notebook.",
                "I use a laptop.",
                "The lid was closed.",
                "I carry it in my bag.",
                "My portable computer is two years old.",
                "It is the thin model that one folds.",
                "The ThinkPad was with me.",
                "I work on my knees in the train.",
                "My MacBook is concerned.",
                "The ultrabook is from the pool.",
                "It runs on battery mostly.",
                "The touch pad reacts.",
            )),
            "monitor": (0.18, (
                "My screen is attached.",
                "The display stays black.",
                "I have two monitors.",
                "The picture flickers.",
                "The panel has a wide format.",
                "One of my screens was swapped.",
                "The resolution looks odd.",
                "It is the 27 inch one.",
                "The brightness is low.",
                "The HDMI cable is in place.",
                "I see a line of dead pixels.",
                "The image is upside down.",
            )),
            "dock": (0.16, (
                "A docking station is in use.",
                "I unplugged the dock.",
                "All cables go through one box.",
                "The USB hub is warm.",
                "The base station has a light.",
                "The adapter on my desk is new.",
                "I dock it each morning.",
                "A single plug joins everything.",
                "The port replicator is on.",
                "The Thunderbolt box hums.",
                "My bar of sockets is connected.",
                "The splitter was replaced.",
            )),
            "headset": (0.14, (
                "I wear a headset.",
                "My microphone is muted.",
                "I hear an echo.",
                "The ear pads are worn.",
                "My voice is faint in calls.",
                "The earphones are wireless.",
                "There is no sound.",
                "Others cannot hear me.",
                "The headphones crackle.",
                "My ear piece is by Jabra.",
                "I took the one with a boom.",
                "The volume wheel is loose.",
            )),
            "phone": (0.16, (
                "It is the same on my phone.",
                "My mobile shows a message.",
                "The SIM card is in.",
                "I got a text message.",
                "My iPhone is managed.",
                "The handset on the desk rings.",
                "I tried my cell.",
                "The Android device is enrolled.",
                "I installed the app on it.",
                "My extension is {number3}.",
                "The smartphone is private.",
                "I dialed twice.",
            )),
            "mouse": (0.14, (
                "The mouse is plugged in.",
                "My pointer jumps.",
                "Clicking works.",
                "The cursor stands still.",
                "The scroll wheel sticks.",
                "I changed its batteries.",
                "The trackball is clean.",
                "The left button is worn.",
                "I point with a pen.",
                "The wireless one for the hand is lost.",
                "Its laser is on.",
                "Double clicks open nothing.",
            )),
        }),
    ),
    (
        "My ticket has the number {number}.", "The mail server is fine.", "I have restarted it.", "{name} sits next to me.",
        "It began on {day}.", "The network was checked already.", "My password is correct.", "I am in room {number3}.",
        "Printing works.", "The software is up to date.", "I rang you on {day}.", "The cable is the old one.",
        "I wrote to {name} as well.", "The update of {day} went well.",
    ),
    {},
)  # fmt: skip

TASKS = {"mails": MAILS, "reviews": REVIEWS, "tickets": TICKETS}


def wordings_of(wordings: tuple[str, ...], group: str) -> list[str]:
    """Return the wordings of a group."""
    return [wording for i, wording in enumerate(wordings) if GROUPS[i % len(GROUPS)] == group]


def sentence(wordings: tuple[str, ...], split: str, rng: random.Random) -> str:
    """Return a wording that the split may have."""
    mixture = MIXTURES[split]
    return rng.choice(wordings_of(wordings, rng.choices(list(mixture), list(mixture.values()))[0]))


def amount(rng: random.Random) -> tuple[float, str]:
    """Return an amount and how a mail says it."""
    value = round(math.exp(rng.uniform(math.log(8), math.log(900)))) + rng.choice((0, 0, 0.5, 0.9, 0.95))
    plain = f"{value:.2f}" if value % 1 else f"{value:.0f}"
    return value, rng.choice((f"{plain} euros", f"EUR {plain}", f"{plain} €", f"€{plain}"))


def draw(question: Question, earlier: Mapping[str, Answer], rng: random.Random) -> Answer:
    """Return an answer as it will be said."""
    values = list(question.wordings)
    shares = [share for share, _ in question.wordings.values()]
    if question.kind == "several":
        number = rng.choices(range(len(HOW_MANY)), HOW_MANY)[0]
        # The smallest of exponential times of these rates: a draw without putting back.
        return sorted(sorted(values, key=lambda value: rng.expovariate(question.wordings[value][0]))[:number])
    if question.by is not None:
        shares = next(list(question.by[str(answer)]) for answer in earlier.values() if str(answer) in question.by)
    value = rng.choices(values, shares)[0]
    return int(value) if question.kind == "ordered" else value


def wrong(question: Question, answer: Answer, rng: random.Random) -> Answer:
    """Return another answer: of an ordered question a neighbor, of several labels with one more or one less."""
    values = list(question.wordings)
    if isinstance(answer, list):
        return sorted(set(answer) ^ {rng.choice(values)})
    if question.kind == "number":
        return amount(rng)[0]
    if question.kind == "ordered":
        numbers = [int(value) for value in values]
        return rng.choice([number for number in numbers if abs(number - int(str(answer))) == 1])
    return rng.choice([value for value in values if value != answer])


def said(question: Question, answer: Answer, split: str, rng: random.Random) -> list[str]:
    """Return the sentences that give an answer."""
    if isinstance(answer, list):
        return [sentence(question.wordings[label][1], split, rng) for label in answer]
    if str(answer) == question.unsaid and rng.random() < 1 / 3:
        return []
    wordings = question.wordings[str(answer)][1]
    times = 2 if rng.random() < TWICE.get(question.kind, 0) else 1
    return list(dict.fromkeys(sentence(wordings, split, rng) for _ in range(times))) if wordings else []


def example(task: Task, split: str, rng: random.Random) -> dict[str, Answer]:
    """Return a text and its answers, of as many words as texts are to have."""
    while True:
        answers: dict[str, Answer] = {}
        for question in task.questions:
            answers[question.name] = draw(question, answers, rng)
        parts = [part for question in task.questions for part in said(question, answers[question.name], split, rng)]
        asides = rng.sample(task.asides, len(task.asides))
        wanted = rng.choice((0, 1, 1, 2))
        while asides and (wanted > 0 or len(" ".join(parts).split()) < WORDS[0]):
            parts.append(asides.pop())
            wanted -= 1
        rng.shuffle(parts)
        value, spoken = amount(rng)
        slots = {name: rng.choice(choices) for name, choices in task.slots.items()}
        slots |= {"name": rng.choice(NAMES), "day": rng.choice(DAYS), "amount": spoken, "number": str(rng.randint(10000, 99999)),
                  "number2": str(rng.randint(2, 9)), "number3": str(rng.randint(101, 499))}  # fmt: skip
        thing = slots.get("thing", "")
        text = " ".join(parts).format(**slots, thing_cap=thing[:1].upper() + thing[1:])
        if WORDS[0] <= len(text.split()) <= WORDS[1]:
            break
    for question in task.questions:
        if question.kind == "number":
            answers[question.name] = value if answers[question.name] else None
        if answers[question.name] is None:
            continue
        if rng.random() < WRONG:
            answers[question.name] = wrong(question, answers[question.name], rng)
        if split == "train" and rng.random() < MISSING:
            answers[question.name] = None
    return {"text": text, **answers}


def examples(task: str, split: str, seed: int, rows: int | None = None) -> list[dict[str, Answer]]:
    """Return the rows of a split; fewer rows are the first of more."""
    rng = random.Random(f"{task} {split} {seed}")
    return [example(TASKS[task], split, rng) for _ in range(SIZES[split] if rows is None else rows)]


def cell(answer: Answer) -> str:
    """Return an answer as a CSV file has it."""
    if isinstance(answer, list):
        return ";".join(answer) or ";"
    if isinstance(answer, float):
        return f"{answer:g}"
    return "" if answer is None else str(answer)


def write(path: Path, rows: list[dict[str, Answer]]) -> None:
    """Write rows to a .csv or .jsonl file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([cell(answer) for answer in row.values()] for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; it may exist")
    parser.add_argument("--task", choices=TASKS, default="mails")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=SIZES["train"], help="training rows")
    parser.add_argument("--format", choices=("csv", "jsonl"), default="csv")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split in SIZES:
        rows = examples(options.task, split, options.seed, options.rows if split == "train" else None)
        path = options.out / f"{split}.{options.format}"
        write(path, rows)
        print(f"{len(rows)} {options.task} in {path}")


if __name__ == "__main__":
    main()
