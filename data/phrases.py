"""Sentences and field names of the demo corpus, with the kinds of the values they hold.

A value stands last before a full stop, a comma or the end of its line, straight after its key.
"""

from __future__ import annotations

from words import PLANS, PROBLEMS, REGIONS

# --- classify ---------------------------------------------------------------------------------

TICKETS = [
    "{name}, a {plan} customer of the {region} branch, writes: my {product} is {problem}{tail}",
    "The {product} from order {code} is {problem}{tail} {first}, {plan} account, {region} branch.",
    "Hello, I have a {plan} account at the {region} branch. The {product} that I ordered in "
    "{month} is {problem}{tail}",
    "From the {region} branch, {plan} account: {first} says that the {product} looks {problem}"
    "{tail}",
    "Dear all, my {product} arrived on {date} and is {problem}{tail} Best wishes, {name}, {plan} "
    "account, {region} branch.",
]
TICKET_TAILS = [
    ".",
    " and I need it soon.",
    ". What can you do for me?",
    ", please tell me what happens next.",
    ". My neighbour saw it too.",
    ". I only noticed when I opened the box this morning, although it looked fine outside.",
    ", although your shop promised that this could never happen.",
    ". I wrote about it last week already and nobody has replied.",
    ". It was meant as a birthday surprise for my sister, so please hurry.",
    ". I have kept the box and the bill, and I can send you pictures of both.",
]
TABLES = [
    ("team", "Teams by problem:", PROBLEMS),
    ("priority", "Priorities by account:", PLANS),
    ("channel", "Channels by branch:", REGIONS),
]

# --- extract ----------------------------------------------------------------------------------

CUSTOMER_FIELDS = {
    "name": "name", "city": "city", "phone": "code", "account": "number", "birthday": "date",
    "agent": "first", "partner": "name", "joined": "number", "discount": "pair", "depot": "city",
    "pet": "animal", "course": "subject",
}  # fmt: skip
ORDER_FIELDS = {
    "product": "product", "colour": "colour", "material": "material", "carrier": "carrier",
    "quantity": "pair", "price": "number", "invoice": "code", "shipped": "date", "paid": "date",
    "weight": "number", "shelf": "pair", "gift": "goods", "origin": "city", "packer": "name",
}  # fmt: skip


NOTES = [
    "The customer has been with us for many years and always settles bills at once.",
    "Please ring twice, since the entrance is at the back of the yard.",
    "Everything was checked before it left, and nobody complained afterwards.",
    "The driver may leave the parcel with a neighbour when nobody answers.",
    "An earlier claim was closed in favour of the customer.",
    "Do not send advertising; the customer asked us twice to stop it.",
    "The address was confirmed during the last conversation.",
    "A small part of it will follow later, together with the instructions.",
    "Wrap it carefully, as it is going to be given away as a present.",
    "Somebody will come and collect it, so keep it behind the counter.",
]

# --- answer -----------------------------------------------------------------------------------

# (question, beginning of the sentence that answers it, kind of value)
RELATIONS = [
    ("What does the harbour export?", "The harbour exports", "goods"),
    ("What does the harbour import?", "The same harbour imports", "goods"),
    ("What does the market sell?", "The market sells", "goods"),
    ("How many people does the mill employ?", "The mill employs", "number"),
    ("What does the school teach?", "The school teaches", "subject"),
    ("What is the mayor called?", "The mayor is called", "name"),
    ("What does the doctor keep?", "The doctor keeps", "animal"),
    ("What does the inn serve?", "The inn serves", "goods"),
    ("What do the farmers grow?", "The farmers grow", "goods"),
    ("What does the museum collect?", "The museum collects", "goods"),
    ("How many books does the library own?", "The library owns", "number"),
    ("Which colour does the painter prefer?", "The painter prefers", "colour"),
    ("Whom did the baker marry?", "The baker married", "name"),
    ("What does the workshop produce?", "The workshop produces", "goods"),
    ("Which material does the carver love?", "The carver loves", "material"),
    ("Which city does the judge visit?", "The judge visits", "city"),
    ("Whom does the choir honour?", "The choir honours", "name"),
    ("What does the club breed?", "The club breeds", "animal"),
    ("How much does the bell weigh?", "The bell weighs", "number"),
    ("When did the clock tower burn?", "The clock tower burned", "date"),
    ("Which city does the railway reach?", "The railway reaches", "city"),
    ("How many coins does the ferry cost?", "The ferry costs", "pair"),
    ("Which firm does the post office hire?", "The post office hires", "carrier"),
    ("What does the widow study?", "The widow studies", "subject"),
    ("Which city did the poet leave?", "The poet left", "city"),
]
FACT_TAILS = [".", ".", ", as everyone knows.", ", to the delight of visitors.",
              ", so people say.", "; ask anyone."]  # fmt: skip
TOWN_FILLERS = [
    "Narrow streets lead down to the water.",
    "In summer the square is full of children.",
    "The old walls are still standing.",
    "Many houses have small gardens.",
    "A steep path climbs the hill behind the church.",
    "Rain is common and nobody minds it.",
    "On warm evenings people sit outside and talk until late.",
    "Strangers are greeted kindly, even when they have lost their way.",
    "Half of the roofs were replaced after the great storm.",
    "There was once a castle here, but only a cellar remains.",
    "Nothing ever happens quickly in this part of the country.",
]
