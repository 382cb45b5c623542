"""Fewer triangles in the visual meshes of a compiled MuJoCo model, so that a CPU renders fast.

LIBERO's scanned objects have 250 000 to 400 000 triangles a scene, most of them smaller than a
pixel; software rendering spends its time on their number. What a mesh looks like from a robot's
distance stays; images are not bit-identical to stock LIBERO, which published figures have to say.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def cluster_faces(vertices: np.ndarray, faces: np.ndarray, cell_m: float) -> np.ndarray:
    """Rows of `faces` to keep, with their corners pulled to one vertex per cell of a grid.

    Args:
        vertices: [V, 3] m.
        faces: [F, 3] vertex indices.
        cell_m: side of a cell.

    Returns:
        [K, 4]: index of the kept face, then its three corners. No face has a corner twice, and no
        two faces have the same corners in the same order.

    Source: vertex clustering (Rossignac and Borrel 1993); the representative is the vertex nearest
        to the mean of its cell, so that no vertex moves to where none was.
    """
    cells = np.floor((vertices - vertices.min(axis=0)) / cell_m).astype(np.int64)
    _, cell = np.unique(cells, axis=0, return_inverse=True)
    cell = cell.reshape(-1)
    nearest = _nearest_to_mean(vertices, cell)[cell]
    corners = nearest[faces]
    distinct = (corners != np.roll(corners, 1, axis=1)).all(axis=1)
    kept = np.flatnonzero(distinct)
    _, first = np.unique(corners[kept], axis=0, return_index=True)
    kept = kept[np.sort(first)]
    return np.column_stack((kept, corners[kept]))


def _nearest_to_mean(vertices: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """[cells] vertex index."""
    counts = np.bincount(cell)
    means = np.column_stack([np.bincount(cell, weights=axis) / counts for axis in vertices.T])
    distance = np.linalg.norm(vertices - means[cell], axis=1)
    order = np.lexsort((distance, cell))
    return order[np.searchsorted(cell[order], np.arange(len(counts)))]


def simplify_model(model: Any, cell_m: float) -> tuple[int, int]:
    """Simplify every mesh that only visual geoms use, in place; physics stays as it was.

    A renderer has to be made afterwards.

    Args:
        model: a mujoco.MjModel.
        cell_m: details smaller than this go.

    Returns:
        faces of these meshes before and after.
    """
    before = after = 0
    for mesh in visual_meshes(model):
        start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        vertex, vertices = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        rows = slice(start, start + count)
        kept = cluster_faces(
            model.mesh_vert[vertex : vertex + vertices].astype(float),
            model.mesh_face[rows],
            cell_m,
        )
        source, room = start + kept[:, 0], slice(start, start + len(kept))
        for attribute in ('mesh_facenormal', 'mesh_facetexcoord'):
            # A corner keeps the normal and the texture point that it had in its own face.
            values = getattr(model, attribute)
            values[room] = values[source]
        model.mesh_face[room] = kept[:, 1:]
        model.mesh_facenum[mesh] = len(kept)
        before, after = before + int(count), after + len(kept)
    return before, after


def visual_meshes(model: Any) -> list[int]:
    """Meshes of geoms that nothing can touch."""
    import mujoco

    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    touchable = (model.geom_contype != 0) | (model.geom_conaffinity != 0)
    solid = set(model.geom_dataid[is_mesh & touchable].tolist())
    return sorted(set(model.geom_dataid[is_mesh].tolist()) - solid)
