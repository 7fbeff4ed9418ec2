"""Common English words from which probes draw keys and lists."""

ADJECTIVES = tuple(
    """
    able ancient angry autumn basic bitter black blind blue bold brave brief bright broad broken
    brown busy calm careful cheap chief civil clean clear clever close cloudy cold common cool
    copper cosy crisp cruel curious curly daily damp dark dear deep dense direct distant double dry
    dull dusty eager early easy empty equal exact fair faint false famous fancy fast fatal fierce
    final fine firm flat fluffy fond formal free frequent fresh friendly full funny gentle giant
    glad golden good grand grateful great green grey handsome happy hard harsh heavy hidden high
    hollow honest huge humble hungry icy idle inner jolly kind large lasting late lazy light likely
    little lively local lonely long loose loud lovely low loyal lucky mad main major mellow merry
    mighty mild minor modern modest narrow neat new nice noble noisy normal odd old open outer pale
    patient plain pleasant polite poor pretty prime private proper proud public pure quick quiet
    rapid rare raw ready real recent red regular rich rigid ripe rough round royal rural sad safe
    scarce secret serious sharp shiny short shy silent simple single slim slow small smart smooth
    soft solid sour spare special square stable steady steep stiff still strange strict strong
    sudden sunny sure sweet swift tall tame tender thick thin tidy tight tiny total tough true
    unique upper urban useful usual vast violet vivid warm weak wealthy weary wet white whole wide
    wild wise wooden yellow young
    """.split()
)
NOUNS = tuple(
    """
    acorn actor address airport album alley animal answer apron arch arena arm arrow artist aunt
    author axe baby badge bag baker ball balloon bank barn basin bath beach beak bean bear beard bed
    bee beetle bell belt bench berry bicycle bird biscuit board boat bone book boot border bowl box
    boy bracelet brain brick broom brother brush bucket bug building bull bus bush button cabin cake
    calendar camel camera camp canal canoe canvas cap car card carpet carrot cart cave ceiling
    cellar chain chair chalk cheese chest chicken child chimney church city clay clerk cliff clock
    cloth cloud clown coach coal coast coat coin collar comb copy corn corner cottage couch cousin
    cow crab cradle crayon cream creek crew crow crowd crown cup curtain cushion dance daughter deer
    desk dinner dish doctor dog doll dolphin donkey door drawer dress drum duck eagle ear earth edge
    egg elbow elephant envelope eye face factory family farm farmer father feast fence field fig
    fire fish flag flame flock floor flower flute fog foot fork fox frame friend frog fruit game
    garage gate gift giraffe girl glass glove goat goose grain grape grass guard guest guitar hair
    hall ham hat hawk heart hedge helmet hen hill hive home hook horn horse hospital hotel house
    insect iron ivory jar jelly jewel judge juice kettle key king kite kitten knee knife knot lake
    lamb lamp lane leaf leather leg letter library lion lizard lock log map marble mask match meal
    melon mice milk mill minute mist money monkey month moon morning mother motor mountain mouse
    mouth museum nail neck nest net night north nose notebook nurse oak oar oasis ocean office olive
    onion orange orchard oven owl owner page pail palace pan parade parcel park parrot partner
    pasture path peach pear pebble pen pencil pepper picture pie pig pigeon pillow pilot pipe pirate
    planet plant plate pocket poem pond pony pool porch potato powder prince prize pump puppy quarter
    queen question quilt quiver rabbit rail rain rat reason recipe record rhythm ribbon rice rider
    ring road robin rock rocket roof room root rope rose saddle sail salt sand scarf school science
    screw sea seat seed servant shadow sheep shelf shell ship shirt shoe shop shore shoulder sidewalk
    sister skirt sky sled smoke snail snake snow soap sock soldier song soup south spade spark spider
    spoon spring squirrel stage stair stamp star station steam stem step stew stick
    stocking store storm story stove stranger straw stream street string sugar suit sun swan table
    tail teacher team temple tent theatre thread throat throne thumb ticket tiger tooth towel tower
    town toy track trail train tray tree truck trumpet tub turkey turtle twig uncle valley van vase
    vessel village violin voice volcano wagon waist wall water wave wax weather wheel whistle wing
    wire wolf wood wool worm wrist writer yard yarn zebra
    """.split()
)


def compound(index: int) -> str:
    """Word number `index` of the `NUM_COMPOUNDS` words made of an adjective, a hyphen and a noun."""
    adjective, noun = divmod(int(index), len(NOUNS))
    return f"{ADJECTIVES[adjective]}-{NOUNS[noun]}"


NUM_COMPOUNDS = len(ADJECTIVES) * len(NOUNS)
LONGEST_COMPOUND = f"{max(ADJECTIVES, key=len)}-{max(NOUNS, key=len)}"
