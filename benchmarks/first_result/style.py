"""A style: every answer has a rule, a reason and a first step, each with its label; asked about other matters."""

from __future__ import annotations

import re

# question, rule, reason, first step
ROWS = [
    ("How do I keep basil alive?", "Water it from below.", "Wet leaves rot.", "Put the pot into a saucer of water today."),
    ("How do I learn to juggle?", "Begin with one ball.", "The throw matters more than the catch.", "Throw one ball to eye height fifty times."),
    ("How can I sleep better?", "Go to bed at the same time.", "The body likes a rhythm.", "Set an alarm for tonight's bedtime."),
    ("How do I clean a burnt pan?", "Soak it with baking soda.", "Soda loosens the crust.", "Boil a cup of water with two spoons of soda."),
    ("How do I save money on food?", "Plan the week's meals.", "A plan stops needless shopping.", "Write down seven dinners now."),
    ("How do I get better at chess?", "Study your lost games.", "Mistakes repeat themselves.", "Replay your last loss and find the first error."),
    ("How do I remove a coffee stain?", "Act within the hour.", "Dried coffee binds to the fibers.", "Dab it with cold water and soap."),
    ("How should I start running?", "Run slowly.", "Speed tires you too early.", "Run one minute and walk two, ten times."),
    ("How do I write a good letter?", "Say the purpose first.", "Readers decide early.", "Write one sentence on what you want."),
    ("How do I keep my desk tidy?", "Give each thing a place.", "Things without a place pile up.", "Find a box for your cables."),
    ("How do I make good tea?", "Do not boil green tea.", "Heat makes it bitter.", "Let the water cool for three minutes."),
    ("How can I read more books?", "Carry a book with you.", "Free minutes come unannounced.", "Put a paperback into your bag."),
    ("How do I sharpen a pencil well?", "Turn the pencil, not the sharpener.", "Even pressure keeps the lead whole.", "Try three slow turns."),
    ("How do I repot a cactus?", "Use dry soil.", "Wet roots rot.", "Wrap the cactus in newspaper and lift it out."),
    ("How do I calm a barking dog?", "Stay quiet yourself.", "A loud voice sounds like barking.", "Turn away and wait for silence."),
    ("How do I remember names?", "Repeat the name at once.", "Saying it fixes it in memory.", "Greet the next person by name."),
    ("How do I fold a shirt?", "Fold the sleeves first.", "They decide the width.", "Lay a shirt face down on the bed."),
    ("How do I save battery on my phone?", "Dim the screen.", "The screen takes most of the power.", "Move the slider to the middle."),
    ("How do I bake crisp bread?", "Add steam.", "A moist crust opens before it hardens.", "Put a bowl of water into the oven."),
    ("How can I stop biting my nails?", "Keep your hands busy.", "A habit needs a substitute.", "Put a pebble into your pocket."),
    ("How do I learn vocabulary?", "Review before you forget.", "Memory fades on a curve.", "Make ten cards tonight."),
    ("How do I hang a picture straight?", "Measure from the ceiling.", "Floors are rarely level.", "Mark two points with a pencil."),
    ("How do I pack a suitcase?", "Roll your clothes.", "Rolls leave no gaps.", "Roll one pair of trousers."),
    ("How do I fix a squeaking door?", "Oil the hinge.", "Dry metal squeaks.", "Put one drop of oil on the upper hinge."),
    ("How do I keep bread fresh?", "Store it cut side down.", "Air dries the crumb.", "Turn the loaf over."),
    ("How should I prepare for a talk?", "Speak it aloud.", "Reading hides the hard parts.", "Say your first sentence three times."),
    ("How do I take better photos?", "Find the light first.", "Light makes the picture.", "Stand with your back to the window."),
    ("How do I grow tomatoes?", "Water them in the morning.", "Cool nights and wet leaves bring disease.", "Place a can beside the plant."),
    ("How do I drink more water?", "Keep a glass in sight.", "We drink what we see.", "Fill a glass and put it by the screen."),
    ("How do I deal with stage fright?", "Breathe out slowly.", "A long breath slows the heart.", "Count to six as you breathe out."),
    ("How do I learn to whistle?", "Wet your lips.", "Dry lips let the air escape.", "Shape an O and blow gently."),
    ("How do I clean windows without streaks?", "Wipe from top to bottom.", "Drops run downward.", "Take a dry newspaper for the last wipe."),
    ("How do I tie a firm knot?", "Pull both ends.", "An uneven knot slips.", "Tie a reef knot around a chair."),
    ("How do I begin to meditate?", "Sit for two minutes.", "Short sessions become a habit.", "Set a timer and close your eyes."),
    ("How do I cook rice?", "Rinse it first.", "Loose starch makes it sticky.", "Rinse a cup of rice three times."),
    ("How do I find lost keys?", "Search one room at a time.", "Jumping about repeats the same places.", "Begin at the front door."),
    ("How do I make a budget?", "Write down every expense.", "We forget small sums.", "Note today's three expenses."),
    ("How do I get up earlier?", "Put the alarm far away.", "Standing up is the hard part.", "Put the clock on the windowsill."),
    ("How do I care for leather shoes?", "Let them rest a day.", "Leather must dry.", "Put paper into your shoes tonight."),
    ("How do I listen better?", "Ask before you answer.", "Questions show what was meant.", "Ask one question in your next talk."),
]  # fmt: skip

TESTS = (
    "How do I peel garlic quickly?", "How can I improve my handwriting?", "How do I keep cut flowers fresh?",
    "How do I learn to swim?", "How do I paint a wall?", "How can I be more patient?", "How do I store potatoes?",
    "How do I clean my glasses?", "How do I choose a melon?", "How do I write a poem?", "How do I keep mosquitoes away?",
    "How do I plan a trip?", "How do I wash wool?", "How can I concentrate better?", "How do I train a puppy?",
    "How do I boil an egg?", "How do I prune roses?", "How do I make friends in a new town?",
)  # fmt: skip

FORM = re.compile(r"^\s*Rule: .+?\s+Reason: .+?\s+First step: .+", re.DOTALL)


def rows() -> list[dict]:
    return [
        {"prompt": question, "completion": f"Rule: {rule}\nReason: {reason}\nFirst step: {step}"}
        for question, rule, reason, step in ROWS
    ]


def tests() -> list[dict]:
    return [{"prompt": question, "form": "style"} for question in TESTS]
