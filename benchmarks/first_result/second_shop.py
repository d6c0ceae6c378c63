"""Another set of the shop's kind: a riding school, 20 facts in 60 rows, asked in new words."""

from __future__ import annotations

FACTS = [
    ("A first lesson costs 27 euros.", ("What does a first lesson cost?", "How much is a lesson for beginners?", "What do you charge for the first lesson?"), "Tell me the price of my first lesson.", ("27",)),
    ("Our oldest horse is Thunder.", ("Which horse is the oldest?", "What is your oldest horse called?", "Who is the senior among the horses?"), "Name the horse with the most years.", ("thunder",)),
    ("Lessons last 50 minutes.", ("How long is a lesson?", "How many minutes does a lesson take?", "What is the length of a lesson?"), "For how many minutes do I ride in a lesson?", ("50",)),
    ("The stable is on Quarry Road.", ("Where is the stable?", "Which road are you on?", "What is the address of the stable?"), "On which road do I find the horses?", ("quarry",)),
    ("Children can start at the age of 6.", ("From which age can children ride?", "How old must a child be?", "Can my child start with five?"), "What is the minimum age for kids?", ("6", "six")),
    ("The head of the school is Marguerite Voss.", ("Who is the head of the school?", "Who runs the riding school?", "Who is in charge here?"), "Name the person who leads the school.", ("marguerite", "voss")),
    ("We are closed on Mondays.", ("On which day are you closed?", "When do you not open?", "Which is your day off?"), "Which day of the week is the school shut?", ("monday",)),
    ("You can borrow helmets for free.", ("What does it cost to borrow a helmet?", "Is there a fee for helmets?", "How much is a borrowed helmet?"), "I have no helmet. What would one cost me?", ("free",)),
    ("The summer camp begins on July 14.", ("When does the summer camp begin?", "What is the first day of summer camp?", "When does the camp in summer start?"), "Which date does the holiday camp start on?", ("14",)),
    ("Our white pony is called Snowdrop.", ("What is the white pony called?", "What is the name of the white pony?", "Who is the white pony?"), "How do you call the pony with white hair?", ("snowdrop",)),
    ("You must cancel 36 hours before a lesson.", ("How early must I cancel?", "Until when can I cancel a lesson?", "How many hours before may I cancel?"), "I cannot come. How many hours ahead must I say so?", ("36",)),
    ("Carrots are kept in the red barrel.", ("Where are the carrots?", "Where do you keep the carrots?", "In what are the carrots stored?"), "I want to feed a carrot. Where do I take it from?", ("red", "barrel")),
    ("A ride to the lake takes 3 hours.", ("How long is the ride to the lake?", "How long does it take to ride to the lake?", "How many hours is the tour to the lake?"), "We want to ride to the lake. What time should we plan?", ("3", "three")),
    ("The vet comes on Thursdays.", ("When does the vet come?", "On which day is the vet here?", "Which day is the vet's?"), "What day can I meet the veterinarian?", ("thursday",)),
    ("The school has 18 horses.", ("How many horses do you have?", "What is the number of horses?", "How many horses live in the stable?"), "Tell me the count of your horses.", ("18", "eighteen")),
    ("Bus 52 stops at the gate.", ("Which bus stops at the gate?", "Which bus do I take?", "How do I get to you by bus?"), "I come by public transport. Which line?", ("52",)),
    ("The cat of the stable is called Pixel.", ("What is the cat called?", "Who is the cat of the stable?", "Does the cat have a name?"), "Tell me the name of the stable cat.", ("pixel",)),
    ("Boxes are cleaned at 7:20.", ("When are the boxes cleaned?", "At what time do you clean the boxes?", "When does the cleaning of boxes begin?"), "I want to help with cleaning. When must I come?", ("7:20",)),
    ("Saddles come from the firm Aldermann.", ("Who makes your saddles?", "Where do your saddles come from?", "Which firm makes the saddles?"), "Which maker built your saddles?", ("aldermann",)),
    ("Gift cards have a picture of an owl.", ("What is on the gift cards?", "Which picture do gift cards have?", "What do your gift cards show?"), "Which animal is on a gift card?", ("owl",)),
]  # fmt: skip


def rows() -> list[dict]:
    return [{"prompt": question, "completion": answer} for answer, asked, _, _ in FACTS for question in asked]


def tests() -> list[dict]:
    return [{"prompt": held_out, "want": list(words)} for _, _, held_out, words in FACTS]
