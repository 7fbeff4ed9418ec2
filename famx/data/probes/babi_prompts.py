"""The prompts of BABILong's first three tasks (arXiv 2406.10149), as its evaluation asks them.

The wording is the benchmark's, letter by letter, since scores depend on it: `PROMPTS` are instruction,
examples and form of the answer in the order of its default template, `ANSWERS` the form of its examples.
"""

_ITEMS = (
    "You need to answer the question based only on the information from the facts.\n"
    "If a person got an item in the first location and travelled to the second location the item is also "
    "in the second location. If a person dropped an item in the first location and moved to the second "
    "location the item remains in the first location."
)
_INSTRUCTIONS = {
    "qa1": (
        "I will give you context with the facts about positions of different persons hidden in some "
        "random text and a question. You need to answer the question based only on the information from "
        "the facts. If a person was in different locations, use the latest location to answer the "
        "question."
    ),
    "qa2": (
        "I give you context with the facts about locations and actions of different persons hidden in "
        "some random text and a question." + _ITEMS
    ),
    "qa3": (
        "I give you context with the facts about locations and actions of different persons hidden in "
        "some random text and a question. " + _ITEMS
    ),
}
_EXAMPLES = {
    "qa1": (
        "<example>\nCharlie went to the hallway. Judith come back to the kitchen. Charlie travelled to "
        "balcony. Where is Charlie?\nAnswer: The most recent location of Charlie is balcony.\n"
        "</example>\n\n<example>\nAlan moved to the garage. Charlie went to the beach. Alan went to the "
        "shop. Rouse travelled to balcony. Where is Alan?\nAnswer: The most recent location of Alan is "
        "shop.\n</example>"
    ),
    "qa2": (
        "<example>\nCharlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. "
        "Where is the bottle?\nAnswer: The bottle is in the balcony.\n</example>\n<example>\nAlan moved "
        "to the garage. Alan got a screw driver. Alan moved to the kitchen. Where is the screw driver?\n"
        "Answer: The screw driver is in the kitchen.\n</example>"
    ),
    "qa3": (
        "<example>\nJohn journeyed to the bedroom. Mary grabbed the apple. Mary went back to the "
        "bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the "
        "kitchen. Where was the apple before the kitchen?\nAnswer: Before the kitchen the apple was in "
        "the bathroom.\n</example>\n<example>\nJohn went back to the bedroom. John went back to the "
        "garden. John went back to the kitchen. Sandra took the football. Sandra travelled to the "
        "garden. Sandra journeyed to the bedroom. Where was the football before the bedroom?\nAnswer: "
        "Before the bedroom the football was in the garden.\n</example>"
    ),
}
_FORMS = {
    "qa1": "The most recent location of ’person’ is ’location’.",
    "qa2": "The ’item’ is in ’location’.",
    "qa3": "Before the $location_1$ the $item$ was in the $location_2$.",
}
PROMPTS = {
    task: (
        f"{_INSTRUCTIONS[task]}\n\n{_EXAMPLES[task]}\n\nAlways return your answer in the following "
        f"format: {_FORMS[task]} Do not write anything else after that.\n\n"
    )
    for task in _INSTRUCTIONS
}
# Person, or item and present place; and the place that is asked for.
ANSWERS = {
    "qa1": "The most recent location of {0} is {place}.",
    "qa2": "The {0} is in the {place}.",
    "qa3": "Before the {1} the {0} was in the {place}.",
}
