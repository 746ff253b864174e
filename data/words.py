"""Word lists of the demo corpus; a fifth of the words of values never occurs in a task.

Knows nothing about tasks. Training meets the unseen words only among the random tokens of repeated
sequences, and the demo prompts leave them out: they are there to measure what the model does with
a word it was never asked about.
"""

from __future__ import annotations

UNSEEN_EVERY = 5

FIRST_NAMES = """Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karin Lukas Marta Nils
Olga Pavel Rosa Simon Tessa Ulrich Vera Walter Yvonne Zoe Adrian Bianca Carlos Diana
Emil Frieda Georg Hanna Igor Julia Klaus Laura Milan Nadia Oscar Petra Quentin Rita
Stefan Tanja Ursula Victor Wanda Xaver Yusuf Zelda Albert Berta Conrad Dora Erwin
Fiona Gustav Helga Ivan Johanna Kurt Lydia Martin Nora Otto Paula Ralf Sonja Tobias
Ute Valentin Wilma Arthur Beate Dieter Edith Franz Gisela Harald Ilse Jakob Kira
Leon Mona Norbert Oda Philip Romy Sven Thea""".split()

LAST_NAMES = """Keller Brandt Voss Lindner Moreau Novak Olsen Peters Quist Richter Sommer Tanner
Unger Vogel Weber Xander Young Zimmer Adler Becker Castell Dorn Ebert Fischer Gruber
Hansen Ivers Jansen Krause Lorenz Maurer Nowak Ortega Pohl Rossi Schmid Thoma Ullman
Varga Wolff Ackerman Bauer Conti Duval Engel Fuchs Garcia Hoffman Isler Jung Kovacs
Lang Meier Nagel Oswald Pfeiffer Renner Sanders Teller Urban Vasquez Winter Albrecht
Bergman Carver Dietrich Erikson Forster Gerber Hauser Imhof Jaeger Kessler Lehman
Mercer Neuman Oberlin Porter Reuter Steiner Thorpe Vetter Walsh""".split()

CITIES = """Lyon Porto Ghent Basel Turin Krakow Malmo Bergen Cork Leeds Graz Trier Nantes
Sevilla Bologna Tartu Riga Vilnius Utrecht Aarhus Dresden Zagreb Split Patras Varna
Brno Pilsen Oulu Lille Bilbao Genoa Verona Leipzig Rostock Kiel Bremen Essen Namur
Bruges Delft Arnhem Tampere Turku Umea Bristol Exeter Dundee Galway Coimbra Faro
Burgos Toledo Parma Trento Linz Salzburg Winterthur Lugano Ostrava Gdansk Lublin
Szeged Pecs Maribor Zadar Sofia Plovdiv Iasi Cluj Timisoara Odessa Lviv Kaunas Narva
Bodo Tromso Visby Odense Esbjerg""".split()

GOODS = """copper timber salt wool honey amber paper glass olives lemons barley hops cheese
butter candles leather linen silk cotton marble slate granite clay bricks tiles
ropes sails barrels baskets carpets clocks violins flutes drums pianos lamps mirrors
kettles knives spoons plates cups bowls chairs tables benches doors windows carts
wagons boats canoes saddles boots gloves hats coats scarves blankets pillows apples
pears plums cherries grapes peaches walnuts almonds chestnuts mushrooms onions
carrots potatoes cabbages beans lentils wheat rye oats maize tobacco tea coffee
cocoa pepper saffron ginger vinegar cider beer wine soap perfume ink paint tar coal
iron zinc tin silver""".split()

COLOURS = """red blue green yellow purple orange brown black white grey pink beige turquoise
crimson ivory maroon olive teal navy lilac scarlet bronze cream rust mint""".split()

MONTHS = """January February March April May June July August September October November
December""".split()

ANIMALS = """horses goats sheep geese ducks bees rabbits ponies donkeys cats hounds falcons
pigeons owls swans hens turkeys mules oxen llamas parrots turtles snails trout eels""".split()

SUBJECTS = """algebra geometry history botany music drawing Latin Greek French Spanish astronomy
chemistry physics geology sewing cooking carpentry fencing dancing rhetoric grammar
poetry logic navigation weaving""".split()

PRODUCTS = """kettle toaster blender lamp printer camera radio speaker router keyboard monitor
backpack suitcase umbrella jacket sweater raincoat tent lantern bicycle helmet
scooter skateboard vase teapot mug carpet curtain mattress pillowcase armchair
bookcase wardrobe mirror clock drill hammer ladder mower heater fan freezer oven
grill juicer mixer shaver hairdryer headset charger""".split()

CARRIERS = """Falke Mercury Nordpost Swiftline Bluebird Atlas Pegasus Comet Orion Condor Zephyr
Polaris Heron Kestrel Arrow Titan Nimbus Vega Lynx Puma""".split()

MATERIALS = """oak pine birch maple steel brass pewter bamboo wicker felt velvet denim canvas
rubber plastic porcelain ceramic concrete aluminium titanium nylon suede cork beech
walnut""".split()

TEAMS = """Returns Shipping Billing Repairs Warranty Accounts Logistics Quality Sales Legal
Security Packing Storage Purchasing Recycling Testing Training Archive Export
Customs Refunds Claims Safety Design Workshop Dispatch Planning Support Finance
Reception""".split()

PRIORITIES = """urgent high normal low critical minor routine deferred instant relaxed steady
elevated standard pressing idle""".split()

CHANNELS = """email phone letter chat video fax courier telegram visit callback message postcard
newsletter portal voicemail""".split()

# Keys: the model has to know what kind of word these are, so none of them is unseen.
PROBLEMS = """broken late missing cracked leaking noisy scratched dented overpriced faulty stained
torn frozen loose rusty mouldy incomplete unpaid duplicated expired wet empty
blocked locked slow dirty bent swollen sticky warped silent dim unsealed mislabelled
burnt foggy crooked melted peeling blurry""".split()

PLANS = """gold premium basic trial family student business senior partner junior platinum
starter""".split()

REGIONS = """northern southern eastern western central coastal alpine island overseas rural urban
inland""".split()

VALUE_LISTS: dict[str, list[str]] = {
    "first": FIRST_NAMES,
    "last": LAST_NAMES,
    "city": CITIES,
    "goods": GOODS,
    "colour": COLOURS,
    "animal": ANIMALS,
    "subject": SUBJECTS,
    "product": PRODUCTS,
    "carrier": CARRIERS,
    "material": MATERIALS,
    "team": TEAMS,
    "priority": PRIORITIES,
    "channel": CHANNELS,
}


def split_pool(words: list[str], unseen: bool) -> list[str]:
    """Return the words of one side of the split, in list order."""
    return [word for i, word in enumerate(words) if (i % UNSEEN_EVERY == 0) == unseen]
