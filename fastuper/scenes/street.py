"""The painter of scenes: it draws a street in perspective, from far to near, and the street's label map.

World coordinates are metres: x to the right from the middle of the road, y up, z along the road. t is x measured from
the middle of the bent road. Picture coordinates (u, v) are right and down from the picture's middle, in units of its
height. Colours are RGB in [0, 255].
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from fastuper.data.classes import SCENE_ID2LABEL

SKY, BUILDING, WALL, ROAD, PAVEMENT, GRASS, TREE, CAR, PERSON, SIGN = SCENE_ID2LABEL

_OVERSAMPLING = 2  # samples per pixel along each axis; a pixel's label is the label of one of its samples
_NEAR = 0.5  # metres; polygons are clipped at this distance from the camera
_TILE = 128  # side of the periodic noise for the texture of surfaces
_SOLID = [0] * 128 + [255] * 128  # lookup table that makes a mask of 0 and 255 from a resampled mask
_CROWN = 128  # side of the pictures of foliage

_Colour = tuple[float, ...]  # red, green, blue
_Rgb = tuple[int, int, int]  # a colour for Pillow, with light and haze
_Point = tuple[Any, Any, Any]  # three coordinates in space, numbers or arrays
_Spot = tuple[Any, Any]  # two coordinates in the picture or in a plane
_Job = tuple[float, Callable[[], None]]  # the distance of an object, and the function that draws it


def _times(colour: _Colour, factor: float) -> _Colour:
    return tuple(channel * factor for channel in colour)


def _mixed(colour: _Colour, other: _Colour, share: float) -> _Colour:
    """Return a colour mixed with a share of another colour."""
    return tuple(a * (1 - share) + b * share for a, b in zip(colour, other, strict=True))


class _Dice:
    """Random draws from one generator, as Python numbers."""

    def __init__(self, generator: np.random.Generator):
        self.generator = generator

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.generator.random())

    def chance(self, probability: float) -> bool:
        return float(self.generator.random()) < probability

    def below(self, count: int) -> int:
        return min(count - 1, int(count * float(self.generator.random())))

    def colour(self, colours: Sequence[_Colour], spread: float = 18) -> _Colour:
        """Return one of the colours, with random changes of brightness and hue."""
        red, green, blue = colours[self.below(len(colours))]
        shift = self.between(-spread, spread)
        return tuple(
            min(250.0, max(6.0, channel + shift + self.between(-spread / 3, spread / 3)))
            for channel in (red, green, blue)
        )


# Colour of the sky at the zenith and at the horizon; sunlight; ambient light; haze per metre.
_WEATHERS = (
    ((62, 115, 200), (178, 208, 236), (0.70, 0.66, 0.56), (0.44, 0.48, 0.56), 0.003),  # clear
    ((95, 140, 205), (208, 218, 228), (0.60, 0.56, 0.50), (0.48, 0.50, 0.55), 0.007),  # hazy
    ((92, 118, 170), (248, 190, 135), (0.80, 0.52, 0.28), (0.40, 0.39, 0.46), 0.006),  # low sun
    ((140, 148, 158), (206, 209, 211), (0.05, 0.05, 0.05), (0.74, 0.76, 0.79), 0.007),  # overcast
    ((172, 177, 182), (194, 198, 202), (0.0, 0.0, 0.0), (0.68, 0.70, 0.72), 0.018),  # mist
    ((44, 58, 112), (206, 134, 116), (0.0, 0.0, 0.0), (0.52, 0.45, 0.50), 0.005),  # dusk
    ((18, 23, 46), (58, 55, 72), (0.0, 0.0, 0.0), (0.42, 0.39, 0.43), 0.006),  # night
)
_SHARES = (0.28, 0.18, 0.16, 0.15, 0.07, 0.10, 0.06)
_LOW_SUN, _DUSK, _NIGHT = 2, 5, 6


class _Weather:
    """The light of a scene: sky, sun, ambient light and haze."""

    def __init__(self, dice: _Dice):
        at = dice.between(0, sum(_SHARES))
        kind = next(i for i in range(len(_SHARES)) if at <= sum(_SHARES[: i + 1]) or i == len(_SHARES) - 1)
        top, low, sun, ambient, haze = _WEATHERS[kind]
        bright = dice.between(0.85, 1.12)
        self.top = tuple(c + dice.between(-14, 14) for c in top)
        self.low = tuple(c + dice.between(-12, 12) for c in low)
        self.sun = _times(sun, bright)
        self.ambient = _times(ambient, bright)
        self.haze = haze * dice.between(0.6, 1.5)
        self.clouds = dice.between(-0.5, 1.0) if kind < 3 else dice.between(0.2, 1.0)
        self.dark = kind in (_DUSK, _NIGHT)
        self.lamps = dice.between(0.25, 0.6) if kind == _NIGHT else 0.0
        azimuth = dice.between(-math.pi, math.pi)
        elevation = dice.between(0.28, 0.5) if kind == _LOW_SUN else dice.between(0.45, 1.1)
        flat = math.cos(elevation)
        self.towards_sun = (flat * math.sin(azimuth), math.sin(elevation), flat * math.cos(azimuth))

    def lit(self, colour: _Colour, normal: _Point, distance: float) -> _Rgb:
        """Return the colour of a lit surface in the picture."""
        x, y, z = self.towards_sun
        facing = max(0.0, normal[0] * x + normal[1] * y + normal[2] * z)
        clear = math.exp(-self.haze * distance)
        red, green, blue = (
            min(255, int(c * (a + s * facing) * clear + h * (1 - clear)))
            for c, a, s, h in zip(colour, self.ambient, self.sun, self.low, strict=True)
        )
        return red, green, blue

    def glowing(self, colour: _Colour, distance: float) -> _Rgb:
        """Return the colour of a light source in the picture."""
        clear = math.exp(-self.haze * distance)
        red, green, blue = (int(c * clear + h * (1 - clear)) for c, h in zip(colour, self.low, strict=True))
        return red, green, blue


class _Camera:
    """The camera: it projects points (t, y, z) of the world to the picture."""

    def __init__(self, dice: _Dice, half_road: float):
        self.height = dice.between(1.35, 2.6)
        self.focal = dice.between(0.82, 1.15)
        self.horizon = dice.between(-0.10, 0.06)  # v of the horizon
        self.t = dice.between(-1.0, 1.0) * (half_road + (1.2 if dice.chance(0.3) else -0.8))
        self.bend = dice.between(-0.0028, 0.0028)
        yaw = dice.between(-0.2, 0.2) - 0.03 * self.t
        roll = dice.between(-0.03, 0.03)
        self.cos_yaw, self.sin_yaw = math.cos(yaw), math.sin(yaw)
        self.cos_roll, self.sin_roll = math.cos(roll), math.sin(roll)

    def from_world(self, point: _Point) -> _Point:
        """Return a point (t, y, z) in the camera's coordinates: right, up, and depth."""
        t, y, z = point
        x = t - self.t + self.bend * z * z
        return x * self.cos_yaw - z * self.sin_yaw, y - self.height, x * self.sin_yaw + z * self.cos_yaw

    def spot(self, local: _Point) -> _Spot:
        """Return (u, v) in the picture of a point in the camera's coordinates."""
        u = self.focal * local[0] / local[2]
        v = self.horizon - self.focal * local[1] / local[2]
        return u * self.cos_roll - v * self.sin_roll, u * self.sin_roll + v * self.cos_roll

    def ground(
        self, u: NDArray[np.floating], v: NDArray[np.floating]
    ) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
        """Return t, z and depth of the ground at (u, v); the depth is infinite above the horizon."""
        across = u * np.float32(self.cos_roll) + v * np.float32(self.sin_roll)
        below = v * np.float32(self.cos_roll) - u * np.float32(self.sin_roll) - np.float32(self.horizon)
        away = np.float32(self.focal * self.height) / np.maximum(below, np.float32(1e-3))
        x = across * away * np.float32(1 / self.focal)
        z = away * np.float32(self.cos_yaw) - x * np.float32(self.sin_yaw)
        t = x * np.float32(self.cos_yaw) + away * np.float32(self.sin_yaw)
        t += np.float32(self.t) - np.float32(self.bend) * z * z
        away[below <= 1e-3] = np.inf
        return t, z, away


@dataclass
class _Side:
    """One side of the road, from the kerb outwards; all numbers are distances from the middle of the road."""

    strips: list[tuple[float, int]]  # inner edge and class of each strip of ground
    path: tuple[float, float]  # inner and outer edge of the pavement
    wall: float | None  # None without a wall
    houses: float | None  # the fronts of the houses; None without houses
    outer: float  # outer limit of the trees
    town: bool


_FACADES: tuple[_Colour, ...] = (
    *((150, 82, 64), (128, 70, 58), (168, 110, 84)),  # brick
    *((212, 198, 168), (222, 216, 200), (196, 170, 120)),  # plaster, sandstone
    *((140, 140, 138), (104, 106, 108), (176, 176, 172)),  # concrete
    *((150, 172, 190), (110, 135, 160)),  # glass
    *((142, 160, 130), (172, 136, 132), (206, 178, 84)),  # paint
)
_ROOFS: tuple[_Colour, ...] = ((120, 62, 48), (84, 80, 82), (66, 68, 76), (140, 92, 68))
_WALLS: tuple[_Colour, ...] = (
    *((146, 84, 66), (160, 152, 138), (186, 176, 150), (120, 120, 118), (112, 84, 58), (200, 198, 190)),
    (96, 110, 84),
)
_ROADS: tuple[_Colour, ...] = ((88, 88, 90), (108, 106, 104), (70, 71, 76), (124, 116, 108))
_PAVEMENTS: tuple[_Colour, ...] = ((150, 148, 144), (122, 120, 120), (166, 156, 140), (146, 104, 88), (108, 107, 108))
_GRASSES: tuple[_Colour, ...] = ((92, 124, 54), (112, 130, 60), (140, 134, 78), (76, 108, 58))
_LEAVES: tuple[_Colour, ...] = (
    *((72, 108, 46), (58, 94, 50), (96, 122, 52), (84, 112, 70), (168, 116, 48), (150, 76, 48)),
    (206, 160, 172),
)
_CARS: tuple[_Colour, ...] = (
    *((118, 120, 124), (176, 178, 180), (46, 47, 50), (230, 230, 228), (88, 92, 98)),
    *((150, 36, 34), (44, 70, 128), (60, 92, 70), (196, 160, 60), (120, 96, 76)),
)
_CLOTHES: tuple[_Colour, ...] = (
    *((44, 48, 60), (90, 92, 96), (150, 52, 48), (66, 92, 140), (84, 104, 66), (180, 168, 146)),
    *((120, 84, 62), (210, 208, 204), (200, 150, 50), (104, 64, 92)),
)
_SKINS: tuple[_Colour, ...] = ((224, 178, 148), (190, 138, 104), (128, 86, 62), (92, 62, 48))
_HAIRS: tuple[_Colour, ...] = ((40, 32, 28), (84, 58, 38), (150, 120, 76), (120, 118, 116))
_BOARDS: tuple[_Colour, ...] = ((38, 84, 168), (186, 40, 42), (236, 236, 232), (240, 196, 40), (30, 110, 70))
_GLASS: _Colour = (46, 54, 62)
_LAMP: _Colour = (250, 210, 140)


class _CarShape(NamedTuple):
    """A type of car. Outlines run from the rear to the front, in shares of the length and of the height."""

    length: float
    height: float
    rear: tuple[_Spot, ...]  # the outline from the rear to the highest point
    front: tuple[_Spot, ...]  # the outline from there to the front
    pane: tuple[_Spot, ...]  # the side windows


_SALOON = _CarShape(
    4.5,
    1.45,
    ((-0.5, 0.2), (-0.5, 0.58), (-0.47, 0.68), (-0.35, 0.7), (-0.22, 0.97), (-0.05, 1.0)),
    ((0.06, 0.98), (0.22, 0.7), (0.44, 0.6), (0.5, 0.48), (0.5, 0.2)),
    ((-0.32, 0.71), (-0.21, 0.92), (-0.05, 0.94), (0.05, 0.92), (0.17, 0.71)),
)
_HATCHBACK = _CarShape(
    4.0,
    1.52,
    ((-0.5, 0.2), (-0.5, 0.6), (-0.46, 0.68), (-0.36, 0.96), (-0.1, 1.0)),
    ((0.06, 0.98), (0.24, 0.68), (0.45, 0.58), (0.5, 0.46), (0.5, 0.2)),
    ((-0.41, 0.7), (-0.33, 0.91), (-0.1, 0.94), (0.05, 0.92), (0.19, 0.7)),
)
_OFF_ROADER = _CarShape(
    4.6,
    1.8,
    ((-0.5, 0.24), (-0.5, 0.6), (-0.48, 0.66), (-0.42, 0.97), (-0.1, 1.0)),
    ((0.08, 0.98), (0.22, 0.68), (0.46, 0.62), (0.5, 0.5), (0.5, 0.24)),
    ((-0.44, 0.69), (-0.38, 0.92), (-0.1, 0.94), (0.07, 0.92), (0.18, 0.69)),
)
_VAN = _CarShape(
    5.2,
    2.2,
    ((-0.5, 0.18), (-0.5, 0.92), (-0.48, 0.98), (0.1, 1.0)),
    ((0.2, 0.97), (0.36, 0.6), (0.48, 0.48), (0.5, 0.4), (0.5, 0.18)),
    ((0.08, 0.62), (0.08, 0.9), (0.19, 0.9), (0.31, 0.62)),
)
_CAR_SHAPES = (*(_SALOON,) * 2, *(_HATCHBACK,) * 2, *(_OFF_ROADER,) * 2, *(_VAN,) * 3)


@dataclass
class _Car:
    t: float  # of the middle
    z: float  # of the middle
    heading: int  # 1 drives away from the camera, -1 towards it
    shape: _CarShape
    length: float
    height: float
    half: float  # half the width
    paint: _Colour

    @property
    def outline(self) -> tuple[_Spot, ...]:
        return self.shape.rear + self.shape.front

    def at(self, share: _Spot, side: float) -> _Point:
        """Return a point of the outline at a position across the body, -1 to 1; the body is narrower at the roof."""
        along, up = share
        narrower = 1 - 0.22 * max(0.0, up - 0.6) / 0.4
        return self.t + side * self.half * narrower, up * self.height, self.z + self.heading * along * self.length

    def across(self, low: _Spot, high: _Spot, left: float = -1, right: float = 1) -> list[_Point]:
        """Return a rectangle across the body, between two points of the outline."""
        return [self.at(low, left), self.at(high, left), self.at(high, right), self.at(low, right)]


@dataclass
class _House:
    side: int  # -1 left of the road, 1 right of it
    t: float  # of the front
    z: float  # of the near end
    length: float  # along the road
    depth: float  # across the road
    floor: float  # the height of a floor
    height: float  # of the walls
    ridge: float  # the height of the roof; 0 for a flat roof
    facade: _Colour
    roof: _Colour
    trim: _Colour
    share: _Spot  # the share of width and height that the windows take
    levels: NDArray[np.floating]  # (floors, windows per floor), [0, 1): the brightness of each pane
    awning: _Colour | None  # None without a shop
    door: int  # the index of the ground floor window that is the door
    chimney: float  # its position along the roof, as a share of the length

    @property
    def far(self) -> float:
        return self.z + self.length

    @property
    def face(self) -> _Point:
        """The normal of the front."""
        return -float(self.side), 0.0, 0.0


class Street:
    """The objects of a scene. Each is drawn on the picture and on the label map at once, from far to near."""

    def __init__(self, generator: np.random.Generator, height: int, width: int):
        self.size = (height, width)
        self.rows, self.columns = height * _OVERSAMPLING, width * _OVERSAMPLING
        self.dice = dice = _Dice(generator)
        self.weather = _Weather(dice)
        self.half_road = dice.between(2.8, 4.6)
        self.camera = _Camera(dice, self.half_road)
        self.sides = {-1: self._side(), 1: self._side()}
        self.tile, self.clouds = _noise(generator)
        self.shadow = Image.new("L", (width, height))
        self.shadow_pen = ImageDraw.Draw(self.shadow)

    def picture(self) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Return the picture, RGB, and the label map (height, width). Call it once: it consumes random numbers."""
        dice = self.dice
        crowns = [self._crown(conical=dice.chance(0.25)) for _ in range(2)]
        skyline = self._skyline()
        outer = []
        for side in self.sides:  # houses, then gardens, then walls, each from far to near
            outer += [*self._houses(side), *self._garden(side, crowns), *self._walls(side)]
        inner = [*self._street_trees(crowns), *self._cars(), *self._people(), *self._signs()]

        image, labels = self._sky_and_ground()
        self.image, self.labels = image, Image.fromarray(labels)
        self.pen, self.label_pen = ImageDraw.Draw(self.image), ImageDraw.Draw(self.labels)
        skyline()
        for _, draw in [*outer, *sorted(inner, key=lambda job: -job[0])]:
            draw()
        step = _OVERSAMPLING
        exact = np.ascontiguousarray(np.asarray(self.labels)[step // 2 :: step, step // 2 :: step])
        return self._photograph(self.image.reduce(step)), exact

    # Layout of the scene

    def _side(self) -> _Side:
        dice = self.dice
        at, strips = self.half_road, []
        if dice.chance(0.42):
            strips.append((at, GRASS))
            at += dice.between(1.8, 3.2)
        strips.append((at, PAVEMENT))
        path = (at, at + dice.between(2.8, 4.8))
        at = path[1]
        kind = dice.between(0, 1)
        if kind < 0.38:  # a town: houses at the pavement, or behind a narrow lawn with a wall
            if dice.chance(0.6):
                return _Side(strips, path, None, at + dice.between(0, 0.6), at, True)
            lawn = at
            strips.append((at, GRASS if dice.chance(0.6) else PAVEMENT))
            at += dice.between(1.5, 3)
            return _Side(strips, path, lawn, at, at, True)
        strips.append((at, GRASS))
        wall = at + dice.between(0, 0.5) if dice.chance(0.8) else None
        if kind < 0.78:  # houses in gardens
            at += dice.between(5, 10)
            return _Side(strips, path, wall, at, at, False)
        return _Side(strips, path, wall, None, at + 34, False)  # a park

    def _houses(self, side: int) -> list[_Job]:
        dice, plan = self.dice, self.sides[side]
        if plan.houses is None:
            return []
        jobs: list[_Job] = []
        z = dice.between(-14, -4)
        while z < 90:
            length = dice.between(7, 16) if plan.town else dice.between(7, 11)
            house = self._house(side, plan.houses + dice.between(0, 0.8), z, length, plan.town)
            jobs.append((z, partial(self._draw_house, house)))
            z += length + (0 if plan.town and dice.chance(0.85) else dice.between(2, 7))
        return jobs[::-1]

    def _house(self, side: int, front: float, z: float, length: float, town: bool) -> _House:
        """Return a house with its front at a distance from the middle of the road, and its near end at z."""
        dice = self.dice
        floors = 2 + dice.below(5 if town else 2)
        floor = dice.between(2.7, 3.4)
        height = floors * floor + dice.between(0.3, 0.9)
        depth = dice.between(8, 12)
        gabled = dice.chance(0.4 if town else 0.85)
        ridge = dice.between(2, 4) if gabled else 0.0
        facade, roof = dice.colour(_FACADES), dice.colour(_ROOFS)
        trim = dice.colour(((225, 222, 214), (90, 84, 78), facade), 10)
        across = max(2, int(length / dice.between(1.7, 3.2)))
        share = (dice.between(0.4, 0.75), dice.between(0.45, 0.7))
        levels = dice.generator.random((floors, across))
        shop = town and dice.chance(0.5)
        awning = dice.colour(_CLOTHES) if dice.chance(0.5) else trim
        house = _House(
            side=side,
            t=side * front,
            z=z,
            length=length,
            depth=depth,
            floor=floor,
            height=height,
            ridge=ridge,
            facade=facade,
            roof=roof,
            trim=trim,
            share=share,
            levels=levels,
            awning=awning if shop else None,
            door=dice.below(across),
            chimney=dice.between(0.15, 0.8),
        )
        if z < 50:
            self._cast(house.t, side * (front + depth), z, house.far, height + ridge / 2)
        return house

    def _draw_house(self, house: _House) -> None:
        if house.far < 1:
            return
        side, t, z, far, height = house.side, house.t, house.z, house.far, house.height
        face, away = house.face, max(1.0, z)
        outer, middle, top = t + side * house.depth, t + side * house.depth / 2, height + house.ridge

        def lit(colour: _Colour, normal: _Point = face) -> _Rgb:
            return self.weather.lit(colour, normal, away)

        end = [(t, 0, z), (t, height, z), (outer, height, z), (outer, 0, z)]
        if house.ridge:
            end.insert(2, (middle, top, z))
        self._polygon(end, lit(house.facade, (0.0, 0.0, -1.0)), BUILDING)
        self._upright(t, z, far, 0, height, lit(house.facade), BUILDING)
        if house.ridge:
            at = z + house.chimney * house.length
            self._upright(middle, at, at + 0.9, top - 0.9, top + 0.7, lit(house.facade), BUILDING)
            slope = math.hypot(house.ridge, house.depth / 2)
            eaves = t - side * 0.3, height - 0.1
            tiles = [(*eaves, z - 0.2), (*eaves, far + 0.2), (middle, top, far + 0.2), (middle, top, z - 0.2)]
            normal = (-side * house.ridge / slope, house.depth / 2 / slope, 0.0)
            self._polygon(tiles, lit(house.roof, normal), BUILDING)
        else:
            self._upright(t, z, far, height - 0.45, height, lit(house.trim), None)
        self._upright(t, z, far, 0, 0.5, lit(_times(house.facade, 0.8)), None)
        if z < 40:
            self._upright(t, z, far, house.floor, house.floor + 0.14, lit(house.trim), None)
        self._draw_windows(house)
        if house.awning:
            self._upright(t, z + 0.3, far - 0.3, house.floor * 0.8, house.floor, lit(house.awning), None)

    def _draw_windows(self, house: _House) -> None:
        weather, floor = self.weather, house.floor
        floors, across = house.levels.shape
        step = house.length / across
        centre = house.z + step * (np.arange(across) + 0.5)
        half = np.full((floors, across), step * house.share[0] / 2)
        bottom = np.repeat((np.arange(floors) * floor + 0.3 * floor)[:, None], across, 1)
        top = bottom + floor * house.share[1]
        if house.awning:
            half[0], bottom[0], top[0] = step * 0.44, 0.5, floor * 0.8
        bottom[0, house.door], half[0, house.door] = 0.05, min(0.6, step * 0.4)
        near, beyond = centre - half, centre + half
        away = max(1.0, house.z)
        frame = weather.lit(house.trim, house.face, away)
        # Panes from dark to bright; after dusk the darkest are lit.
        panes = [
            weather.lit(_mixed(_GLASS, weather.low, (level / 8) ** 2 * 0.8), house.face, away) for level in range(8)
        ]
        if weather.dark:
            panes[:3] = [weather.glowing(_times(_LAMP, 0.6 + level / 6), away) for level in range(3)]
        for margin, glass in ((0.12, False), (0.0, True)):
            zs = np.stack([near - margin, near - margin, beyond + margin, beyond + margin], -1)
            ys = np.stack([bottom - margin, top + margin, top + margin, bottom - margin], -1)
            local = self.camera.from_world((house.t, ys, zs))
            x, y = self._pixels(self.camera.spot(local))
            # Windows behind the camera, of less than a few samples, or outside the picture are left out.
            visible = (local[2] > _NEAR).all(-1) & (y[..., 0] - y[..., 1] > 3) & (np.abs(x[..., 2] - x[..., 0]) > 1.5)
            visible &= (x.max(-1) > 0) & (x.min(-1) < self.columns) & (y.max(-1) > 0)
            outlines = np.stack([x, y], -1).reshape(floors, across, 8)[visible].tolist()
            for outline, level in zip(outlines, (house.levels[visible] * 8).astype(int).tolist(), strict=True):
                self.pen.polygon(outline, fill=panes[level] if glass else frame)
                if glass and outline[4] - outline[0] > 0.03 * self.rows:  # a glazing bar
                    middle = (outline[0] + outline[4]) / 2
                    ends = [(middle, (outline[1] + outline[7]) / 2), (middle, (outline[3] + outline[5]) / 2)]
                    self.pen.line(ends, fill=frame, width=max(1, self.rows // 200))

    def _walls(self, side: int) -> list[_Job]:
        dice, plan = self.dice, self.sides[side]
        if plan.wall is None:
            return []
        colour, height = dice.colour(_WALLS), dice.between(1.25, 2.4)
        cap = tuple(min(250.0, c * 1.15) for c in colour) if dice.chance(0.6) else dice.colour(_WALLS)
        planks = dice.chance(0.4)
        step = dice.between(3, 5)
        t = side * plan.wall
        jobs = []
        z = dice.between(-3, 0)
        while z < 62:
            if dice.chance(0.94):
                jobs.append((z, self._wall(side, t, z, z + step, height, colour, cap, planks)))
                if z < 30:
                    self._cast(t, t + side * 0.2, z, z + step, height)
            z += step
        return jobs[::-1]

    def _wall(
        self, side: int, t: float, z: float, far: float, height: float, colour: _Colour, cap: _Colour, planks: bool
    ) -> Callable[[], None]:
        shade = self.dice.between(0.93, 1.05)

        def draw() -> None:
            lit = self.weather.lit
            face, end = (-float(side), 0.0, 0.0), (0.0, 0.0, -1.0)
            away = max(1.0, z)
            surface = _times(colour, shade)
            thick = [(t, 0, z), (t, height, z), (t + side * 0.3, height, z), (t + side * 0.3, 0, z)]
            self._polygon(thick, lit(surface, end, away), WALL)
            if self.camera.height > height:
                top = [(t, height, z), (t, height, far), (t + side * 0.3, height, far), (t + side * 0.3, height, z)]
                self._polygon(top, lit(cap, (0.0, 1.0, 0.0), away), WALL)
            self._upright(t, z, far, 0, height, lit(surface, face, away), WALL)
            if planks and z < 16:
                dark = lit(_times(surface, 0.68), face, away)
                for i in range(1, 12):
                    at = z + (far - z) * i / 12
                    self._upright(t, at, at + 0.05, 0, height, dark, None)
            self._upright(t, z, far, height - 0.14, height, lit(cap, face, away), None)
            pier = _times(cap, 0.9)
            self._upright(t, z, z + 0.4, 0, height * 1.08, lit(pier, face, away), WALL)

        return draw

    def _garden(self, side: int, crowns: Sequence[tuple[Image.Image, Image.Image]]) -> list[_Job]:
        """Return the trees behind the pavement."""
        dice, plan = self.dice, self.sides[side]
        if plan.town:
            return []
        room = plan.outer - plan.path[1]
        count = 3 + dice.below(4) if plan.houses is not None else 10 + dice.below(8)
        jobs = []
        for _ in range(count):
            t = plan.path[1] + 1.2 + dice.between(0.05, 0.8) * room
            z = dice.between(7, 60)
            jobs.append((z, self._tree(side * t, z, dice.between(4, 9), crowns[dice.below(2)])))
        return sorted(jobs, key=lambda job: -job[0])

    def _street_trees(self, crowns: Sequence[tuple[Image.Image, Image.Image]]) -> list[_Job]:
        dice = self.dice
        jobs = []
        for side, plan in self.sides.items():
            if not dice.chance(0.55):
                continue
            t = side * (plan.path[0] + dice.between(-0.4, 0.6))
            height, step = dice.between(5, 9), dice.between(8, 14)
            z = dice.between(6, 14)
            while z < 65:
                if dice.chance(0.85):
                    jobs.append((z, self._tree(t, z, height * dice.between(0.85, 1.1), crowns[0])))
                z += step
        return jobs

    def _tree(self, t: float, z: float, height: float, crown: tuple[Image.Image, Image.Image]) -> Callable[[], None]:
        leaves = self.dice.colour(_LEAVES)
        bark: _Colour = (self.dice.between(60, 110), self.dice.between(55, 85), self.dice.between(45, 70))
        bare = height * self.dice.between(0.22, 0.36)
        across = height * self.dice.between(0.6, 0.95)
        mirrored = self.dice.chance(0.5)
        self._cast_disc(t, z, across / 2, (bare + height) / 2)
        self._cast(t - 0.15, t + 0.15, z, z + 0.2, bare)

        def draw() -> None:
            x, y, scale, away = self._stand(t, z)
            if away < 3:
                return
            thick = scale * max(0.13, 0.028 * height)
            trunk = [(x - thick * 1.25, y), (x - thick * 0.8, y - bare * 1.3 * scale)]
            trunk += [(x + thick * 0.8, y - bare * 1.3 * scale), (x + thick * 1.25, y)]
            facing = (0.5 * math.copysign(1, self.weather.towards_sun[0]), 0.0, -0.8)
            self._draw(trunk, self.weather.lit(bark, facing, away), TREE)
            box = (x - across / 2 * scale, y - height * scale, x + across / 2 * scale, y - bare * scale)
            self._foliage(crown, box, leaves, away, mirrored)

        return draw

    def _foliage(
        self,
        crown: tuple[Image.Image, Image.Image],
        box: tuple[float, float, float, float],
        leaves: _Colour,
        away: float,
        mirrored: bool,
    ) -> None:
        left, top, right, bottom = box
        x0, x1 = max(0, int(left)), min(self.columns, math.ceil(right))
        y0, y1 = max(0, int(top)), min(self.rows, math.ceil(bottom))
        if x0 >= x1 or y0 >= y1 or right - left < 2 or bottom - top < 2:
            return

        def share(at: int, low: float, high: float) -> float:
            return min(float(_CROWN), max(0.0, (at - low) / (high - low) * _CROWN))

        source = share(x0, left, right), share(y0, top, bottom), share(x1, left, right), share(y1, top, bottom)
        shade, mask = (layer.resize((x1 - x0, y1 - y0), Image.Resampling.BILINEAR, box=source) for layer in crown)
        weather = self.weather
        clear = math.exp(-weather.haze * away)
        level = np.arange(256, dtype=np.float32)[:, None] / 255
        light = weather.ambient * (0.3 + level) + weather.sun * np.maximum(0, level - 0.3) * np.float32(1.5)
        table = np.minimum(255, leaves * light * clear + np.multiply(weather.low, 1 - clear)).astype(np.uint8)
        mask = mask.point(_SOLID)
        self.image.paste(Image.fromarray(table[np.asarray(shade)]), (x0, y0), mask)
        self.labels.paste(TREE, (x0, y0, x1, y1), mask)

    def _crown(self, conical: bool) -> tuple[Image.Image, Image.Image]:
        """Return two pictures of a crown: the brightness of its leaves, and its mask."""
        dice = self.dice
        grid = (np.arange(_CROWN, dtype=np.float32) + 0.5) / _CROWN * 2 - 1
        x, y = grid[None], -grid[:, None]
        sun_x, sun_y, sun_z = self.weather.towards_sun
        sideways = sun_x * self.camera.cos_yaw - sun_z * self.camera.sin_yaw
        roughness = self.tile[:_CROWN, :_CROWN]
        inside = np.full((_CROWN, _CROWN), -1, np.float32)
        light = np.zeros_like(inside)
        for i in range(12):
            if conical:
                cy = -0.75 + 1.6 * i / 12
                reach = 0.62 * (0.85 - cy) / 1.7
                cx, radius = dice.between(-reach, reach) * 0.7, max(0.16, reach * 0.75)
            else:
                angle, out = dice.between(0, 2 * math.pi), math.sqrt(dice.between(0, 1)) * 0.58
                cx, cy, radius = out * math.cos(angle), out * math.sin(angle) * 0.95, dice.between(0.24, 0.42)
            dx, dy = (x - cx) / radius, (y - cy) / radius
            depth = 1 - dx * dx - dy * dy
            above = depth > inside
            np.copyto(inside, depth, where=above)
            np.copyto(light, dx * sideways * 0.5 + dy * (0.35 + 0.3 * sun_y) + cy * 0.45, where=above)
        shade = 0.5 + 0.3 * light + 0.22 * roughness
        mask = inside + 0.16 * roughness > 0.12
        return (
            Image.fromarray((np.clip(shade, 0, 1) * 255).astype(np.uint8)),
            Image.fromarray(mask.astype(np.uint8) * 255),
        )

    def _cars(self) -> list[_Job]:
        dice = self.dice
        jobs = []
        for side in self.sides:
            if dice.chance(0.7):  # parked cars
                t = side * (self.half_road - 1.05)
                z = dice.between(4.5, 12)
                while z < 36:
                    if dice.chance(0.62):
                        jobs.append((z, self._car(t + dice.between(-0.15, 0.15), z, 1 if dice.chance(0.7) else -1)))
                    z += dice.between(5.8, 7.5)
        lane = self.half_road / 2 - 0.3
        for _ in range(1 + dice.below(2)):
            side = 1 if dice.chance(0.5) else -1
            z = dice.between(7, 34)
            if all(abs(z - other) > 6 for other, _ in jobs):
                jobs.append((z, self._car(side * lane, z, side)))
        if not jobs:
            jobs.append((11.0, self._car(lane, 11.0, 1)))
        return jobs

    def _car(self, t: float, z: float, heading: int) -> Callable[[], None]:
        """Return the function that draws a car whose middle is at (t, z); heading 1 drives away from the camera."""
        dice = self.dice
        shape = _CAR_SHAPES[dice.below(len(_CAR_SHAPES))]
        car = _Car(
            t=t,
            z=z,
            heading=heading,
            shape=shape,
            length=shape.length * dice.between(0.94, 1.06),
            height=shape.height * dice.between(0.96, 1.06),
            half=dice.between(0.86, 0.96),
            paint=dice.colour(_CARS),
        )
        self._cast(t - car.half, t + car.half, z - car.length / 2, z + car.length / 2, car.height * 0.8, contact=True)
        return partial(self._draw_car, car)

    def _draw_car(self, car: _Car) -> None:
        lit = self.weather.lit
        near = car.z - car.length / 2
        if near < 1.2:
            return
        # The underside, and the tyres of the near end.
        end, inset, top = (0.0, 0.0, -1.0), car.half * 0.9, 0.24 * car.height
        left, right = car.t - inset, car.t + inset
        below = [(left, 0.17, near), (right, 0.17, near), (right, top, near), (left, top, near)]
        self._polygon(below, lit((22, 22, 24), end, near), CAR)
        for side in (-1, 1):
            left, right, z = car.t + side * car.half, car.t + side * (car.half - 0.24), near + 0.4
            tyre = [(left, 0, z), (right, 0, z), (right, 0.4, z), (left, 0.4, z)]
            self._polygon(tyre, lit((18, 18, 19), end, near), CAR)
        edges = []
        for first, second in pairwise(car.outline):
            dz, dy = car.heading * (second[0] - first[0]) * car.length, (second[1] - first[1]) * car.height
            size = math.hypot(dz, dy)
            normal = (0.0, car.heading * dz / size, -car.heading * dy / size)
            y = (first[1] + second[1]) / 2 * car.height
            depth = car.z + car.heading * (first[0] + second[0]) / 2 * car.length
            if normal[1] * (self.camera.height - y) - normal[2] * depth > 0:  # this part of the body faces the camera
                edges.append((depth, first, second, normal))
        for depth, first, second, normal in sorted(edges, key=lambda edge: -edge[0]):
            self._polygon(car.across(first, second), lit(car.paint, normal, depth), CAR)
            # Steep parts above the belt line are windows.
            if min(first[1], second[1]) > 0.57 and abs(second[1] - first[1]) > 0.2:
                glass = _mixed(_GLASS, self.weather.low, 0.2 * max(0.0, normal[1]) + 0.08)
                low, high = sorted((first, second), key=lambda point: point[1])
                sill, rim = (
                    (low[0] + (high[0] - low[0]) * share, low[1] + (high[1] - low[1]) * share) for share in (0.08, 0.86)
                )
                self._polygon(car.across(sill, rim, -0.9, 0.9), lit(glass, normal, depth), None)
        if near < 35:
            self._draw_car_end(car, near)
        toward = self.camera.t - (car.t + self.camera.bend * car.z * car.z)
        if abs(toward) > car.half:
            self._draw_car_side(car, math.copysign(1, toward))

    def _draw_car_end(self, car: _Car, away: float) -> None:
        """Draw lamps, number plate and bumper of the near end."""
        weather, normal = self.weather, (0.0, 0.0, -1.0)
        if car.heading > 0:  # the rear
            end, top, lamp, shining, plate = -0.505, car.outline[1][1], (170, 30, 28), (235, 50, 40), (226, 206, 120)
        else:
            end, top, lamp, shining, plate = (
                0.505,
                car.outline[-2][1],
                (226, 226, 216),
                (255, 244, 214),
                (220, 220, 214),
            )
        light = weather.glowing(shining, away) if weather.dark else weather.lit(lamp, normal, away)
        low, high, out = (0.3, 0.62, 0.92) if top > 0.8 else (top - 0.16, top - 0.03, 0.95)
        for side in (-1, 1):
            self._polygon(car.across((end, low), (end, high), side * out, side * (out - 0.3)), light, None)
        self._polygon(car.across((end, 0.34), (end, 0.43), -0.26, 0.26), weather.lit(plate, normal, away), None)
        bumper = weather.lit(_times(car.paint, 0.6), normal, away)
        self._polygon(car.across((end, 0.2), (end, 0.3)), bumper, None)

    def _draw_car_side(self, car: _Car, side: float) -> None:
        normal = (side, 0.0, 0.0)

        def part(points: Sequence[_Spot], colour: _Colour, label: int | None = None, out: float = 1.0) -> None:
            self._polygon(
                [car.at(point, side * out) for point in points], self.weather.lit(colour, normal, car.z), label
            )

        part(car.outline, car.paint, CAR)
        part([(-0.5, 0.2), (-0.5, 0.29), (0.5, 0.29), (0.5, 0.2)], _times(car.paint, 0.62))
        part(car.shape.pane, _mixed(_GLASS, self.weather.low, 0.2), out=1.005)
        low, rear = min(y for _, y in car.shape.pane), min(x for x, _ in car.shape.pane)
        for x in (-0.22, -0.06):
            if rear < x - 0.06:
                part([(x, low), (x, 0.94), (x + 0.02, 0.94), (x + 0.02, low)], car.paint)
        for x in (-0.31, 0.31):
            for radius, colour in ((0.34, (20, 20, 21)), (0.2, (120, 122, 124)), (0.06, (60, 60, 62))):
                angles = [math.pi * i / 6 for i in range(12)]
                rim = [
                    (x + radius / car.length * math.cos(angle), (0.34 + radius * math.sin(angle)) / car.height)
                    for angle in angles
                ]
                part(rim, colour, CAR if radius > 0.3 else None, out=1.01)

    def _people(self) -> list[_Job]:
        dice = self.dice
        jobs = []
        for index in range(2 + dice.below(3)):
            for _ in range(8):
                side = 1 if dice.chance(0.5) else -1
                low, high = self.sides[side].path
                z = 3.6 + 4.6 * dice.between(0, 1) ** (1.2 if index else 2)
                crossing = dice.chance(0.22)
                t = dice.between(-self.half_road, self.half_road) if crossing else side * dice.between(low, high)
                local = self.camera.from_world((t, 0, z))
                # Visible in narrow pictures too.
                if local[2] > 2.5 and abs(self.camera.spot(local)[0]) < 0.6:
                    jobs.append((z, self._person(t, z)))
                    break
        return jobs

    def _person(self, t: float, z: float) -> Callable[[], None]:
        dice = self.dice
        tall = dice.between(1.55, 1.92) if dice.chance(0.85) else dice.between(1.15, 1.4)
        wide = dice.between(1.12, 1.38)
        stride = dice.between(-0.09, 0.09)
        turned = dice.between(-0.35, 0.35)
        coat = dice.between(0.3, 0.5) if dice.chance(0.6) else 0.5
        top, legs = dice.colour(_CLOTHES), dice.colour(_CLOTHES)
        skin, hair = dice.colour(_SKINS, 8), dice.colour(_HAIRS, 8)
        away_from_us = dice.chance(0.45)
        bag = dice.colour(_CLOTHES) if dice.chance(0.3) else None
        bag_side = 1 if dice.chance(0.5) else -1
        self._cast(t - 0.2, t + 0.2, z - 0.1, z + 0.1, tall, contact=True)

        def draw() -> None:
            x, y, scale, away = self._stand(t, z)
            if away < 2:
                return
            lit = self.weather.lit
            tilt = (math.sin(turned), 0.25, -math.cos(turned))
            size = tall * scale

            def part(points: Sequence[_Spot], colour: _Colour, light: float = 1.0) -> None:
                shaded = _times(colour, light)
                outline = [(x + a * wide * size, y - b * size) for a, b in points]
                self._draw(outline, lit(shaded, tilt, away), PERSON)

            for foot, light in ((stride, 0.82), (-stride, 0.95)):
                hip = math.copysign(0.045, foot)
                part(((hip - 0.05, 0.52), (foot - 0.035, 0.03), (foot + 0.04, 0.03), (hip + 0.05, 0.52)), legs, light)
                part(
                    ((foot - 0.045, 0.0), (foot - 0.04, 0.045), (foot + 0.045, 0.045), (foot + 0.055, 0.0)),
                    (34, 30, 28),
                )
            for side, swing in ((-1, stride), (1, -stride)):
                hand = side * 0.15 + swing * 0.6
                arm = (
                    (side * 0.09, 0.82),
                    (side * 0.14, 0.79),
                    (hand + side * 0.025, 0.46),
                    (hand - side * 0.03, 0.46),
                )
                part(arm, top, 0.85)
                part(((hand - 0.025, 0.47), (hand + 0.025, 0.47), (hand + 0.02, 0.42), (hand - 0.02, 0.42)), skin)
            body = ((-0.1, coat), (-0.1, 0.62), (-0.125, 0.79), (-0.08, 0.83), (0.08, 0.83), (0.125, 0.79), (0.1, 0.62))
            part((*body, (0.1, coat)), top)
            part(((0.0, coat), (0.0, 0.82), (0.08, 0.83), (0.125, 0.79), (0.1, 0.62), (0.1, coat)), top, 0.9)
            if bag:
                part(
                    [(bag_side * a, b) for a, b in ((0.06, 0.48), (0.06, 0.62), (0.19, 0.62), (0.19, 0.48))], bag, 0.95
                )
            part(((-0.03, 0.82), (-0.03, 0.87), (0.03, 0.87), (0.03, 0.82)), skin, 0.85)
            # Broad and slim persons have heads of one width.
            ring = [(math.cos(math.pi * i / 7), math.sin(math.pi * i / 7)) for i in range(14)]
            part([(0.055 / wide * a, 0.925 + 0.07 * b) for a, b in ring], hair if away_from_us else skin)
            if not away_from_us:
                cap = [(0.06 / wide * a, 0.935 + 0.072 * b) for a, b in ring[:8]]
                part(cap, hair)

        return draw

    def _signs(self) -> list[_Job]:
        dice = self.dice
        jobs = []
        for _ in range(1 + dice.below(2)):
            for _ in range(16):
                side = 1 if dice.chance(0.5) else -1
                low, high = self.sides[side].path
                t = side * (low + dice.between(0.2, 0.8) if dice.chance(0.7) else high - 0.3)
                z = dice.between(4.5, 9.5)
                local = self.camera.from_world((t, 0, z))
                if local[2] > 3.8 and abs(self.camera.spot(local)[0]) < 0.6:
                    jobs.append((z, self._sign(t, z)))
                    break
        return jobs

    def _sign(self, t: float, z: float) -> Callable[[], None]:
        dice = self.dice
        kind = dice.below(5)
        height = dice.between(2.3, 3.2)
        radius = dice.between(0.5, 0.75)
        board, rim = dice.colour(_BOARDS, 10), dice.colour(_BOARDS, 10)
        post = dice.colour(((112, 114, 116), (70, 72, 74), (150, 150, 148)))
        light = dice.below(3)
        self._cast(t - 0.08, t + 0.08, z, z + 0.1, height, contact=True)
        self._cast(t - radius, t + radius, z, z + 0.1, height, lowest=height - 2 * radius)

        def draw() -> None:
            x, y, scale, away = self._stand(t, z)

            def part(points: Sequence[_Spot], colour: _Colour, shines: bool = False) -> None:
                weather = self.weather
                rgb = weather.glowing(colour, away) if shines else weather.lit(colour, (0.0, 0.1, -0.99), away)
                self._draw([(x + a * scale, y - b * scale) for a, b in points], rgb, SIGN)

            def box(left: float, right: float, low: float, high: float) -> list[_Spot]:
                return [(left, low), (left, high), (right, high), (right, low)]

            def ring(up: float, size: float, corners: int, turn: float = 0.0) -> list[_Spot]:
                angles = [2 * math.pi * i / corners + turn for i in range(corners)]
                return [(size * math.sin(angle), up + size * math.cos(angle)) for angle in angles]

            middle = height - radius
            part(box(-0.12, 0.12, 0, middle), post)
            part(box(0.03, 0.12, 0, middle), _times(post, 0.75))
            if kind == 0:  # traffic lights
                part(box(-0.3, 0.3, height - 1.5, height), (34, 36, 38))
                for i, colour in enumerate(((230, 44, 36), (250, 180, 40), (40, 210, 110))):
                    lamp = ring(height - 0.28 - 0.47 * i, 0.19, 10)
                    part(lamp, colour if i == light else (50, 46, 44), shines=i == light)
            elif kind == 1:  # a direction board
                wide, up = radius * 1.7, radius * 0.75
                part(box(-wide, wide, middle - up, middle + up), rim)
                wide, up = wide - 0.07, up - 0.07
                part(box(-wide, wide, middle - up, middle + up), board)
                for line in (0.35, -0.3):
                    low, high = middle + up * (line - 0.16), middle + up * (line + 0.16)
                    part(box(-wide * 0.8, wide * 0.5, low, high), (236, 236, 232))
            else:  # a disc, a triangle, a stop sign
                corners, turn = ((16, 0.0), (3, 0.0), (8, math.pi / 8))[kind - 2]
                size = radius * 1.25 if corners == 3 else radius
                part(ring(middle, size, corners, turn), rim)
                part(ring(middle, size * 0.76, corners, turn), board)
                part(box(-0.4 * radius, 0.4 * radius, middle - 0.1 * radius, middle + 0.1 * radius), (240, 240, 236))

        return draw

    def _skyline(self) -> Callable[[], None]:
        """Return the function that draws distant trees or houses at the horizon."""
        dice = self.dice
        wooded = dice.chance(0.5)
        colour = dice.colour(_LEAVES[:4] if wooded else _FACADES)
        count = 60
        heights = dice.generator.random(count)
        high = dice.between(0.03, 0.08)

        def draw() -> None:
            weather, camera = self.weather, self.camera
            spots: list[_Spot] = []
            for i, height in enumerate(heights):
                u = -3 + 6 * i / (count - 1)
                v = camera.horizon - high * (0.55 + 0.45 * float(height))
                spots += [(u, v)] if wooded else [(u, v), (u + 6 / (count - 1), v)]
            spots += [(3.2, camera.horizon + 0.004), (-3.2, camera.horizon + 0.004)]
            outline = [
                self._pixels((u * camera.cos_roll - v * camera.sin_roll, u * camera.sin_roll + v * camera.cos_roll))
                for u, v in spots
            ]
            self._draw(outline, weather.lit(colour, (0.0, 0.4, -0.6), 90), TREE if wooded else BUILDING)

        return draw

    # Sky and ground, computed per pixel

    def _sky_and_ground(self) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Return the picture of sky and ground, without objects, and the classes (rows, columns) of its samples.

        Classes and road markings have edges and are sampled more finely than the picture; colours are not.
        """
        rows, columns, camera = self.rows, self.columns, self.camera
        height, width = self.size
        step = _OVERSAMPLING
        u = ((np.arange(columns, dtype=np.float32) + 0.5 - columns / 2) / rows)[None]
        v = ((np.arange(rows, dtype=np.float32) + 0.5) / rows - 0.5)[:, None]
        reach = columns / rows / 2 * abs(camera.sin_roll)
        # The rows of the picture that the horizon crosses.
        first = min(height, max(0, int(((camera.horizon - reach) / camera.cos_roll + 0.5) * height) - 1))
        last = min(height, max(0, math.ceil(((camera.horizon + reach) / camera.cos_roll + 0.5) * height) + 1))
        labels = np.full((rows, columns), SKY, np.uint8)
        image = Image.new("RGB", (width, height))
        if last:
            image.paste(self._sky(last), (0, 0))
        if first < height:
            t, z, away = camera.ground(u, v[first * step :])
            on_ground = np.isfinite(away)
            paint, colours = self._paint(t, z)
            # The last two paints, road markings and kerbs, belong to the classes road and pavement.
            classes = np.array([*SCENE_ID2LABEL, ROAD, PAVEMENT], np.uint8)[paint]
            np.copyto(labels[first * step :], classes, where=on_ground)
            base = np.asarray(Image.fromarray(colours[paint]).reduce(step)) if step > 1 else colours[paint]
            at = (slice(step // 2, None, step),) * 2
            colour = self._lit_ground(base, paint[at], t[at], z[at], away[at], first)
            image.paste(Image.fromarray(colour), (0, first), Image.fromarray(on_ground[at].astype(np.uint8) * 255))
        return image.resize((columns, rows), Image.Resampling.NEAREST), labels

    def _sky(self, height: int) -> Image.Image:
        """Return the sky of the picture's first `height` rows, computed at half the size, since it has no edges."""
        weather, camera = self.weather, self.camera
        few, across = max(2, height // 2), max(2, self.size[1] // 2)
        v = ((np.arange(few, dtype=np.float32) + 0.5) / few * height / self.size[0] - 0.5)[:, None] - camera.horizon
        u = ((np.arange(across, dtype=np.float32) + 0.5) / across - 0.5)[None] * (self.size[1] / self.size[0])
        up = np.maximum(-v, 0) + 0 * u
        share = np.minimum(1, up * 1.7)[..., None] ** 0.7
        top, low = np.array(weather.top, np.float32), np.array(weather.low, np.float32)
        sky = low + (top - low) * share
        # Clouds have one altitude: they are further away near the horizon.
        distance = 1 / (up + 0.12)
        turn = math.atan2(camera.sin_yaw, camera.cos_yaw) * 60
        cloud = _sample(self.clouds, distance * 11, u * distance * 13 + turn, smooth=True)
        cloud = np.clip(cloud * 0.5 + weather.clouds * 0.6 - 0.15, 0, 1)[..., None] * 0.8
        white = np.minimum(255, low * 0.7 + 70 * (np.array(weather.sun, np.float32) + weather.ambient))
        sky += (white - sky) * cloud
        x, y, z = weather.towards_sun
        ahead = x * camera.sin_yaw + z * camera.cos_yaw
        if ahead > 0.05 and weather.sun[0] > 0.3:  # a glow around the sun
            sun_u = camera.focal * (x * camera.cos_yaw - z * camera.sin_yaw) / ahead
            sun_v = -camera.focal * y / ahead
            glow = 1 / (1 + 30 * ((u - sun_u) ** 2 + (v - sun_v) ** 2))
            sky += glow[..., None] * (255 - sky) * 0.8
        image = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))
        return image.resize((self.size[1], height), Image.Resampling.BILINEAR)

    def _paint(self, t: NDArray[np.floating], z: NDArray[np.floating]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the paint of the ground at (t, z), and the colours of the paints: classes, road markings, kerbs."""
        dice = self.dice
        marks, kerb = len(SCENE_ID2LABEL), len(SCENE_ID2LABEL) + 1
        colours = np.zeros((len(SCENE_ID2LABEL) + 2, 3))
        colours[ROAD], colours[PAVEMENT] = dice.colour(_ROADS), dice.colour(_PAVEMENTS)
        colours[GRASS] = dice.colour(_GRASSES)
        colours[marks] = dice.colour(((222, 222, 216), (206, 204, 196)), 10)
        colours[kerb] = np.minimum(250, colours[PAVEMENT] * (dice.between(1.15, 1.35) if dice.chance(0.7) else 0.72))
        paint = np.full(t.shape, ROAD, np.uint8)
        half_width = 0.075
        if dice.chance(0.8):
            period, dashed = dice.between(4, 9), dice.chance(0.75)
            line = np.abs(t) < half_width
            paint[line & (np.remainder(z, period) < period * 0.45) if dashed else line] = marks
        if dice.chance(0.4):
            paint[np.abs(np.abs(t) - (self.half_road - 0.35)) < half_width] = marks
        if dice.chance(0.4):  # a crossing
            across = np.abs(z - dice.between(5, 22)) < 1.6
            paint[(np.remainder(t + self.half_road, 1) < 0.5) & across] = marks
        for side, plan in self.sides.items():
            out = t * side
            for start, label in plan.strips:
                if label == PAVEMENT:
                    paint[out > start] = kerb
                    start += 0.22
                paint[out > start] = label
        return paint, colours.astype(np.uint8)

    def _lit_ground(
        self,
        base: NDArray[np.uint8],
        paint: NDArray[np.uint8],
        t: NDArray[np.floating],
        z: NDArray[np.floating],
        away: NDArray[np.floating],
        first: int,
    ) -> NDArray[np.uint8]:
        """Return the ground's colours from row `first` of the picture on, with texture, light, shadow and haze."""
        dice, weather = self.dice, self.weather
        strength = np.full(len(SCENE_ID2LABEL) + 2, 0.10, np.float32)
        strength[GRASS], strength[PAVEMENT] = 0.26, 0.07
        near = 1 / (1 + away * 0.12)
        shade = strength[paint]
        shade *= _sample(self.tile, z * 20, t * 20, smooth=True) * near + 0.6 * _sample(self.clouds, z * 2.5, t * 2.5)
        shade += 1
        slab = dice.between(0.5, 0.9)
        joint = (np.remainder(t, slab) < 0.035) | (np.remainder(z, slab * 1.5) < 0.05)
        shade -= (joint & (paint == PAVEMENT)) * near * 0.16

        shadow = self.shadow.filter(ImageFilter.GaussianBlur(self.size[0] / 300))
        dark = np.asarray(shadow)[first:] * np.float32(1 / 255)
        pool = np.zeros(())
        if weather.lamps:  # pools of light under the street lamps
            pool = np.clip(1 - np.abs(np.remainder(z, 17) - 8.5) / 5, 0, 1) * weather.lamps
            pool = pool * np.clip(1.3 - np.abs(t) / (self.half_road + 5), 0, 1)
        clear = np.exp(away * -weather.haze)
        result = np.empty((*t.shape, 3), np.uint8)
        for channel in range(3):
            direct, ambient = weather.sun[channel] * weather.towards_sun[1], weather.ambient[channel]
            light = (ambient + direct) - dark * (ambient * 0.4 + direct) + pool * (_LAMP[channel] / 255)
            value = base[..., channel] * shade * light
            haze = weather.low[channel]
            result[..., channel] = np.clip(haze + (value - haze) * clear, 0, 255)
        return result

    # Drawing

    def _pixels(self, spot: _Spot) -> _Spot:
        """Return the column and the row of the sample at (u, v)."""
        return spot[0] * self.rows + (self.columns - 1) / 2, spot[1] * self.rows + (self.rows - 1) / 2

    def _outline(self, points: Sequence[_Point]) -> list[_Spot]:
        """Return a polygon in samples, clipped at `_NEAR`; empty if it lies behind the camera."""
        local = [self.camera.from_world(point) for point in points]
        if any(point[2] < _NEAR for point in local):
            cut = []
            for before, here in zip([local[-1], *local[:-1]], local, strict=True):
                if (before[2] < _NEAR) != (here[2] < _NEAR):
                    w = (_NEAR - before[2]) / (here[2] - before[2])
                    cut.append((before[0] + w * (here[0] - before[0]), before[1] + w * (here[1] - before[1]), _NEAR))
                if here[2] >= _NEAR:
                    cut.append(here)
            local = cut
        return [self._pixels(self.camera.spot(point)) for point in local] if len(local) > 2 else []

    def _polygon(self, points: Sequence[_Point], colour: _Rgb, label: int | None) -> None:
        self._draw(self._outline(points), colour, label)

    def _upright(
        self, t: float, z: float, far: float, low: float, high: float, colour: _Rgb, label: int | None
    ) -> None:
        """Draw a vertical rectangle along the road, from z to far and from low to high."""
        self._polygon([(t, low, z), (t, high, z), (t, high, far), (t, low, far)], colour, label)

    def _draw(self, outline: Sequence[_Spot], colour: _Rgb, label: int | None) -> None:
        """Fill a polygon; with label None the label map does not change, for details of an object."""
        if len(outline) < 3:
            return
        columns = [x for x, _ in outline]
        if max(columns) < 0 or min(columns) > self.columns:
            return
        self.pen.polygon(outline, fill=colour)
        if label is not None:
            self.label_pen.polygon(outline, fill=label)

    def _stand(self, t: float, z: float) -> tuple[float, float, float, float]:
        """Return column and row of a point on the ground, samples per metre, and depth (0 if behind the camera)."""
        local = self.camera.from_world((t, 0, z))
        if local[2] < _NEAR:
            return 0.0, 0.0, 0.0, 0.0
        x, y = self._pixels(self.camera.spot(local))
        return x, y, self.camera.focal * self.rows / local[2], local[2]

    def _shade(self, points: Sequence[_Spot], level: int = 255) -> None:
        """Draw a polygon (t, z) of the ground into the shadow map."""
        outline = self._outline([(t, 0.0, z) for t, z in points])
        if outline:
            self.shadow_pen.polygon([(x / _OVERSAMPLING, y / _OVERSAMPLING) for x, y in outline], fill=level)

    def _cast(
        self, t: float, other: float, z: float, far: float, height: float, lowest: float = 0.0, contact: bool = False
    ) -> None:
        """Draw the shadow of a box; without sun, only the contact shadow under it."""
        x, y, depth = self.weather.towards_sun
        corners = ((t, z), (other, z), (other, far), (t, far))
        if contact:
            self._shade(corners, 170)
        if self.weather.sun[0] < 0.3:
            return
        low, high = ([(a - up * x / y, b - up * depth / y) for a, b in corners] for up in (lowest, height))
        self._shade(high)
        for i in range(4):
            self._shade((low[i - 1], low[i], high[i], high[i - 1]))

    def _cast_disc(self, t: float, z: float, radius: float, height: float) -> None:
        x, y, depth = self.weather.towards_sun
        if self.weather.sun[0] < 0.3:
            return
        t, z = t - height * x / y, z - height * depth / y
        angles = [math.pi * i / 7 for i in range(14)]
        self._shade([(t + radius * math.cos(a), z + radius * 1.2 * math.sin(a)) for a in angles])

    def _photograph(self, image: Image.Image) -> Image.Image:
        """Return the picture with the camera's exposure, colour cast, blur, noise and compression."""
        dice = self.dice
        gains = [dice.between(0.84, 1.22) for _ in range(3)]
        gamma = dice.between(0.82, 1.12)
        vignette, noise = dice.between(0, 0.3), dice.between(1.5, 4.5) * (1.15 if self.weather.dark else 1.0)
        blur, quality = dice.between(0, 0.0018), 60 + dice.below(36)
        gain = sum(gains) / 3
        if blur > 0.0004:
            image = image.filter(ImageFilter.GaussianBlur(blur * self.size[0]))
        level = np.arange(256, dtype=np.float32) / 255
        tables = [255 * np.clip(level**gamma * (0.6 * gain + 0.4 * g), 0, 1) for g in gains]
        values = np.asarray(image.point(np.concatenate(tables).round().astype(int).tolist())).astype(np.float32)
        height, width = self.size
        y = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None, None]
        x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / height)[None, :, None]
        # A slight variation of brightness: no surface has one colour.
        stain = _sample(self.clouds, y * 60, x * 60) * 0.015 + _sample(self.tile, y * 300, x * 300) * 0.015
        values *= 1 + stain - np.float32(vignette) * (x * x + y * y) * 1.4
        values += np.float32(noise) * self.dice.generator.standard_normal(values.shape, dtype=np.float32)
        image = Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
        stream = io.BytesIO()
        image.save(stream, format="JPEG", quality=quality)
        stream.seek(0)
        return Image.open(stream).convert("RGB")


def _sample(
    texture: NDArray[np.floating], row: NDArray[np.floating], column: NDArray[np.floating], smooth: bool = False
) -> NDArray[np.floating]:
    """Return a periodic texture at positions: its nearest value, or with `smooth` the bilinear mean of four."""
    above, left = np.floor(row), np.floor(column)
    rows, columns = above.astype(np.int32) & (_TILE - 1), left.astype(np.int32) & (_TILE - 1)
    value = texture[rows, columns]
    if not smooth:
        return value
    down, right = row - above, column - left
    next_rows, next_columns = (rows + 1) & (_TILE - 1), (columns + 1) & (_TILE - 1)
    value = value + right * (texture[rows, next_columns] - value)
    below = texture[next_rows, columns]
    below = below + right * (texture[next_rows, next_columns] - below)
    return value + down * (below - value)


def _noise(generator: np.random.Generator) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """Return two periodic textures (128, 128) of mean 0 and variance 1: a fine grain, and clouds."""
    spectrum = np.fft.rfft2(generator.standard_normal((_TILE, _TILE), dtype=np.float32))
    rows, columns = np.fft.fftfreq(_TILE)[:, None] * _TILE, np.fft.rfftfreq(_TILE)[None] * _TILE
    frequency = np.maximum(1, np.hypot(rows, columns))
    textures = []
    for power, lowest in ((0.8, 4), (1.7, 1)):
        filtered = np.fft.irfft2(spectrum * np.where(frequency < lowest, 0, frequency**-power), s=(_TILE, _TILE))
        textures.append((filtered / filtered.std()).astype(np.float32))
    return textures[0], textures[1]
