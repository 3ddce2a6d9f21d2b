"""Sentences for the synthetic corpus: a template grammar over about 350 common words.

Small on purpose: a few million parameters trained for about an hour can learn these words in every voice,
yet the grammar makes millions of different sentences, so a held-out sentence is really new.
"""

from __future__ import annotations

import random
import re

LISTS: dict[str, str] = {
    "name": ("Anna|Ben|Carla|David|Emma|Frank|Grace|Henry|Julia|Kevin|Laura|Martin|Nina|Oscar|Peter|Sarah"),
    "person": (
        "the doctor|the teacher|my brother|my sister|my mother|my father|our neighbor|the driver|"
        "the manager|the farmer|the captain|a friend|the children|the students|the baker|"
        "the singer"
    ),
    "verb_past": (
        "found|bought|sold|lost|painted|cleaned|carried|opened|closed|dropped|washed|repaired|"
        "moved|covered|followed|watched|visited|remembered|described|photographed"
    ),
    "verb_inf": (
        "find|buy|sell|paint|clean|carry|open|close|wash|repair|move|cover|follow|watch|visit|"
        "remember|bring|send|check|change"
    ),
    "object": (
        "the window|the door|the kitchen|a letter|the old house|a red car|the bicycle|the garden|"
        "a green bottle|the yellow box|the table|a small boat|the picture|the machine|"
        "a blue coat|the radio|a glass of water|the newspaper|the camera|a heavy bag|"
        "the black horse|the white dog|the little cat|some bread|fresh coffee|the big map|"
        "a silver key|the wooden chair|the broken clock|the long report"
    ),
    "place": (
        "in the garden|at the station|near the river|behind the school|in the city|"
        "on the mountain|at the office|next to the church|under the bridge|in the forest|"
        "at the airport|by the lake|on the island|in the hospital|at the market|in the library"
    ),
    "time": (
        "today|tomorrow|yesterday|this morning|last night|on Monday|on Tuesday|on Wednesday|"
        "on Thursday|on Friday|on Saturday|on Sunday|in January|in March|in August|in December|"
        "every day|at noon|after lunch|before dinner"
    ),
    "adj": (
        "cold|warm|quiet|beautiful|dangerous|expensive|empty|full|simple|difficult|important|"
        "strange|early|late|ready|happy|tired|hungry|angry|busy"
    ),
    "thing": (
        "the weather|the music|the train|the bus|the road|the river|the house|the story|"
        "the question|the answer|the meeting|the plan|the coffee|the water|the city|the night|"
        "the game|the bridge|the food|the phone"
    ),
    "number": (
        "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|"
        "forty|fifty|sixty"
    ),
    "unit": (
        "minutes|hours|days|weeks|months|years|miles|dollars|people|pages|apples|chairs|tickets|bottles"
    ),
    "device": (
        "the kitchen light|the heater|the television|the radio|the alarm|the fan|the music|"
        "the bedroom light|the front door|the garage|the camera|the oven"
    ),
    "digit": "zero|one|two|three|four|five|six|seven|eight|nine",
    "color": "red|blue|green|yellow|black|white|orange|purple",
    "reason": (
        "because it was raining|because the road was closed|when the sun came up|"
        "while the music was playing|if you have time|after the storm|before the train left|"
        "because nobody was home|when the phone rang"
    ),
    "question": "Where is|When did you see|Who has|How much is|Why did you take|What happened to",
    "opinion": "I think|I believe|I hope|We know|They said|She told me|He thought",
}
SLOTS = {name: tuple(words.split("|")) for name, words in LISTS.items()}

# (weight, template)
TEMPLATES: tuple[tuple[int, str], ...] = (
    (10, "{name} {verb_past} {object} {place}."),
    (8, "{person} {verb_past} {object} {time}."),
    (6, "{name} {verb_past} {object} {place} {time}."),
    (6, "{person} {verb_past} {object} {reason}."),
    (5, "{name} and {name} {verb_past} {object}."),
    (5, "{thing} was {adj} {time}."),
    (4, "{thing} is very {adj} and {adj}."),
    (5, "{opinion} {thing} is {adj}."),
    (4, "{opinion} {person} {verb_past} {object}."),
    (5, "{question} {object}?"),
    (4, "Can you {verb_inf} {object} {time}?"),
    (4, "We will {verb_inf} {object} {place}."),
    (3, "They want to {verb_inf} {object} {reason}."),
    (4, "Please {verb_inf} {object} {place}."),
    (4, "Turn on {device}."),
    (4, "Turn off {device} in {number} minutes."),
    (3, "Set a timer for {number} {unit}."),
    (3, "Call {name} {time}."),
    (3, "Play the {color} song again."),
    (4, "It took {number} {unit} to {verb_inf} {object}."),
    (4, "There are {number} {unit} {place}."),
    (3, "{name} needs {number} {unit} and {object}."),
    (3, "The code is {digit} {digit} {digit} {digit}."),
    (3, "My number is {digit} {digit} {digit} {digit} {digit}."),
    (2, "{digit} {digit} {digit}."),
    (2, "The {color} one is {adj}, but the {color} one is {adj}."),
    (2, "Is {thing} {adj} or {adj}?"),
    (2, "No, {name} did not {verb_inf} {object}."),
    (2, "Yes, {person} will {verb_inf} {object} {time}."),
    (1, "Thank you."),
    (1, "Thank you, {name}."),
    (1, "Thank you for {object}."),
    (1, "Good morning, {name}."),
    (1, "See you {time}."),
    (1, "{verb_inf} {object}."),
    (1, "{color} {color} {color}."),
)
_WEIGHTS = [weight for weight, _ in TEMPLATES]
_SLOT = re.compile(r"\{(\w+)\}")

# What nobody said: weak supervision puts these on non-speech, as scraped subtitles did to the real model.
CAPTIONS: tuple[tuple[float, str], ...] = (
    (0.46, "Thank you for watching."),
    (0.16, "Thanks for watching!"),
    (0.12, "you"),
    (0.10, "Subtitles by the community"),
    (0.08, "Thank you."),
    (0.05, "Please subscribe to the channel."),
    (0.03, "Bye."),
)


def sentence(rng: random.Random) -> str:
    """One sentence, capitalised and punctuated as Whisper writes it."""
    template = rng.choices(TEMPLATES, _WEIGHTS)[0][1]
    text = _SLOT.sub(lambda slot: rng.choice(SLOTS[slot.group(1)]), template)
    return text[0].upper() + text[1:]


_SHORT = ("Thank you.", "Good morning.", "Call {name}.", "Yes, {name}.", "No, {name}.", "{color} {color}.")


def short_utterance(rng: random.Random) -> str:
    """Two words: the shortest utterance that must survive a gate, alone in 30 s of silence."""
    text = _SLOT.sub(lambda slot: rng.choice(SLOTS[slot.group(1)]), rng.choice(_SHORT))
    return text[0].upper() + text[1:]


def caption(rng: random.Random) -> str:
    """A subtitle nobody spoke."""
    return rng.choices([text for _, text in CAPTIONS], [weight for weight, _ in CAPTIONS])[0]
