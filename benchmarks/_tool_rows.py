"""Made-up tools, questions that need them, and training rows of the kind of Glaive and Hermes: the same for a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

CITIES = ("Paris", "Oslo", "Lima", "Cairo", "Quito", "Hanoi", "Turin", "Ghent", "Perth", "Kyoto")
DAYS = ("Monday", "Tuesday", "Friday", "Sunday")
Tool = tuple[str, str, dict[str, Any], tuple[str, ...]]
"""Name, description, the values of each argument (numbers, a choice if it is a list, else words), and questions."""
TAUGHT: tuple[Tool, ...] = (
    ("get_weather", "The weather in a city.", {"city": CITIES, "unit": ["celsius", "fahrenheit"]}, ("What is the weather in {city} in {unit}?", "Tell me in {unit} how warm {city} is.")),
    ("convert_money", "Converts an amount of money.", {"amount": range(10, 900), "to": ["EUR", "USD", "JPY"]}, ("How much is {amount} in {to}?", "Please convert {amount} to {to}.")),
    ("set_timer", "Starts a timer.", {"minutes": range(1, 90)}, ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes.")),
    ("play_song", "Plays a song.", {"title": ("Yesterday", "Hurt", "Creep", "Africa", "Jolene", "Zombie")}, ("Play {title}.", "I would like to hear {title}.")),
    ("find_recipe", "Finds a recipe.", {"dish": ("risotto", "goulash", "pancakes", "ramen", "paella"), "diet": ["any", "vegan"]}, ("Find a {diet} recipe for {dish}.", "How do I cook {dish}, {diet} please?")),
    ("book_table", "Books a table in a restaurant.", {"restaurant": ("Roma", "Sakura", "Adler", "Olive"), "people": range(2, 12)}, ("Book a table for {people} at {restaurant}.", "We are {people}. Reserve at {restaurant}, please.")),
    ("add_task", "Adds a task to the list.", {"title": ("buy milk", "call Ann", "pay rent", "fix bike"), "day": list(DAYS)}, ("Remind me to {title} on {day}.", "Add {title} for {day}.")),
    ("get_stock", "The price of a share.", {"symbol": ("AAPL", "TSLA", "SAP", "NVDA", "IBM")}, ("What does {symbol} cost?", "Price of {symbol}, please.")),
    ("switch_light", "Switches a light.", {"room": ("kitchen", "hall", "attic", "garage"), "state": ["on", "off"]}, ("Turn the light in the {room} {state}.", "Light {state} in the {room}!")),
    ("track_parcel", "Where a parcel is.", {"number": range(1000, 9999)}, ("Where is parcel {number}?", "Track {number} for me.")),
    ("translate_word", "Translates a word.", {"word": ("bread", "river", "window", "cloud"), "language": ["French", "Spanish", "German"]}, ("What is {word} in {language}?", "Say {word} in {language}.")),
    ("search_flights", "Finds flights.", {"origin": CITIES, "destination": CITIES}, ("Find a flight from {origin} to {destination}.", "I need to fly to {destination} from {origin}.")),
)  # fmt: skip
HELD_OUT: tuple[Tool, ...] = (
    ("get_time", "The time in a city.", {"city": CITIES}, ("What time is it in {city}?", "Tell me the time in {city}.")),
    ("rent_bike", "Rents a bike.", {"hours": range(1, 12), "kind": ["city", "mountain", "electric"]}, ("Rent a {kind} bike for {hours} hours.", "I need a {kind} bike for {hours} hours.")),
    ("order_pizza", "Orders a pizza.", {"topping": ("mushroom", "salami", "tuna", "spinach"), "size": ["small", "large"]}, ("Order a {size} pizza with {topping}.", "One {size} {topping} pizza, please.")),
    ("check_train", "When the next train goes.", {"origin": CITIES, "destination": CITIES}, ("When is the next train from {origin} to {destination}?", "Next train to {destination} from {origin}?")),
    ("open_account", "Opens an account.", {"name": ("Ann", "Ravi", "Mia", "Tom", "Olga"), "currency": ["EUR", "USD"]}, ("Open a {currency} account for {name}.", "{name} wants a {currency} account.")),
)  # fmt: skip
SMALL_TALK = (
    ("Thank you!", "You are welcome."),
    ("Hello!", "Hello! How can I help?"),
    ("Are you a robot?", "I am an assistant. What do you need?"),
    ("Good night.", "Good night!"),
)


def schema_of(tool: Tool) -> dict[str, Any]:
    """Return a tool as OpenAI's API has it."""
    properties = {}
    for name, values in tool[2].items():
        kind = "integer" if isinstance(values, range) else "string"
        properties[name] = {"type": kind, **({"enum": values} if isinstance(values, list) else {})}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": tool[0], "description": tool[1], "parameters": parameters}}


def asked(tools: Sequence[Tool], draw: random.Random) -> tuple[str, list[dict[str, Any]], tuple[str, dict[str, Any]]]:
    """Return a question, the two tools that are shown with it, and the right call."""
    tool, other = draw.sample(tools, 2)
    arguments = {name: draw.choice(values) for name, values in tool[2].items()}
    shown = [schema_of(tool), schema_of(other)]
    draw.shuffle(shown)
    return draw.choice(tool[3]).format(**arguments), shown, (tool[0], arguments)


def training_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of messages and tools; one of eight needs no tool."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        question, tools, (name, arguments) = asked(TAUGHT, draw)
        if number % 8 == 7:
            question, answer = draw.choice(SMALL_TALK)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        else:
            call = {"id": "call_1", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            result = draw.randint(1, 99)
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": json.dumps({"result": result})},
                {"role": "assistant", "content": f"The result is {result}."},
            ]
        rows.append({"messages": messages, "tools": tools})
    return rows


def held_out_prompts(count: int, seed: int = 1) -> list[tuple[str, list[dict[str, Any]], tuple[str, dict[str, Any]]]]:
    """Return questions about tools that no training row has."""
    draw = random.Random(seed)
    return [asked(HELD_OUT, draw) for _ in range(count)]
